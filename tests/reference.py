"""Relevance propagation the slow way: messages R_{i←j} from every output j to every input i, in float64, without a gradient.

A second opinion on the engine, written from the papers and sharing no code with it:
z-rule on sums and ε-rule on linear maps, R_{i←j} = a_i w_ji / (z_j + ε sign z_j) · R_j (Bach et al. 2015); identity rule on
element-wise functions, uniform ½ rule on products, softmax by its Taylor expansion, norms as a linear map at a constant
statistic (AttnLRP, Achtibat et al. 2024, arXiv 2402.05602); CP-LRP, where attention weights and gates are constants (Ali et al. 2022).
What a router decides is constant: a token's output is a weighted sum over its experts, which the z-rule shares out.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Relevance:
    """What flowed where. T tokens; names are module paths.

    Attributes:
        logit: the target.
        weights: R_W [out, in] of each linear map.
        outputs: Σ_t R of each linear map's outputs [out].
        heads: Σ_t R of the attention's output, by head [H].
        embeddings, positions: R of token and position embeddings [T].
        biases: R of all biases together.
    """

    logit: float = 0.0
    weights: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    embeddings: Tensor | None = None
    positions: Tensor | None = None
    biases: float = 0.0


def per_unit(relevance: Tensor, value: Tensor) -> Tensor:
    """R_j / z_j, with 0/0 = 0: where nothing flows out, nothing came in."""
    return torch.where(relevance == 0, torch.zeros_like(value), relevance / value)


def sum_rule(first: Tensor, second: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    share = per_unit(relevance, first + second)
    return first * share, second * share


def matmul_rule(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Messages of a [n, k] · b [k, m] to both factors, each in full; the caller halves them."""
    messages = a[:, :, None] * b[None, :, :] * per_unit(relevance, a @ b)[:, None, :]
    return messages.sum(2), messages.sum(0)


def softmax_rule(scores: Tensor, weights: Tensor, relevance: Tensor) -> Tensor:
    """R_i = x_i (R_i − s_i Σ_j R_j) (AttnLRP, Eq. 13), zero where masked."""
    seen = weights > 0
    return torch.where(
        seen,
        scores.masked_fill(~seen, 0) * (relevance - weights * relevance.sum(-1, keepdim=True)),
        torch.zeros_like(weights),
    )


class Propagation:
    """Weights of a model in float64, and the relevance found so far."""

    def __init__(self, model: Any, cp: bool, gate: float | None = None, epsilon: float = 0.0) -> None:
        self.state = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
        self.cp, self.epsilon = cp, epsilon
        self.gate = gate if gate is not None else 0.0 if cp else 0.5
        self.found = Relevance()

    def linear(self, name: str, a: Tensor) -> Tensor:
        z = a @ self.state[f"{name}.weight"].T
        return z + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else z

    def linear_back(self, name: str, a: Tensor, relevance: Tensor) -> Tensor:
        """R of z = W a + b [T, out] to a [T, in]; notes R_W, R_z and R_b."""
        z = self.linear(name, a)
        share = per_unit(relevance, z + self.epsilon * z.sign())
        messages = self.state[f"{name}.weight"] * a[:, None, :] * share[:, :, None]
        self.found.weights[name] = messages.sum(0)
        self.found.outputs[name] = relevance.sum(0)
        if f"{name}.bias" in self.state:
            self.found.biases += float((share * self.state[f"{name}.bias"]).sum())
        return messages.sum(1)

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.state[f"{name}.weight"] * centred / _deviation(x) + self.state[f"{name}.bias"]

    def layer_norm_back(self, name: str, x: Tensor, relevance: Tensor) -> Tensor:
        """The linear map diag(γ/σ)(I − 11ᵀ/n) plus bias, at the σ of this x."""
        n = x.shape[-1]
        matrix = (self.state[f"{name}.weight"] / _deviation(x))[:, :, None] * (torch.eye(n).double() - 1 / n)
        share = per_unit(relevance, self.layer_norm(name, x))
        self.found.biases += float((share * self.state[f"{name}.bias"]).sum())
        return (matrix * x[:, None, :] * share[:, :, None]).sum(1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention, [T, H, d] each (k and v may have fewer heads); the result is [T, H, d]."""
        group = q.shape[1] // k.shape[1]
        return torch.stack(
            [_weights(q[:, h], k[:, h // group])[1] @ v[:, h // group] for h in range(q.shape[1])], 1
        )

    def attend_back(
        self, q: Tensor, k: Tensor, v: Tensor, relevance: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        to_q, to_k, to_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for head in range(q.shape[1]):
            shared = head // (q.shape[1] // k.shape[1])
            scores, weights = _weights(q[:, head], k[:, shared])
            from_weights, from_values = matmul_rule(weights, v[:, shared], relevance[:, head])
            if self.cp:
                to_v[:, shared] += from_values
                continue
            to_v[:, shared] += from_values / 2
            of_scores = softmax_rule(scores, weights, from_weights / 2)
            from_q, from_k = matmul_rule(q[:, head] / math.sqrt(q.shape[2]), k[:, shared].T, of_scores)
            to_q[:, head] += from_q / 2
            to_k[:, shared] += from_k.T / 2
        return to_q, to_k, to_v


def _deviation(x: Tensor, eps: float = 1e-5) -> Tensor:
    return (x.var(-1, keepdim=True, correction=0) + eps).sqrt()


def _weights(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [T, T] and attention weights of one head."""
    scores = q @ k.T / math.sqrt(q.shape[1])
    return scores, scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf).softmax(-1)


def _rotations(tokens: int, width: int, theta: float) -> Tensor:
    """RoPE as the matrices that it is: [T, d, d]. Angles in float32, as transformers computes them."""
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2).float() / width)
    angles = torch.outer(torch.arange(tokens).float(), frequencies)
    cos, sin, half = angles.cos().double(), angles.sin().double(), width // 2
    matrix = torch.zeros(tokens, width, width, dtype=torch.float64)
    for i in range(half):
        matrix[:, i, i] = matrix[:, i + half, i + half] = cos[:, i]
        matrix[:, i, i + half], matrix[:, i + half, i] = -sin[:, i], sin[:, i]
    return matrix


def _rotate(matrix: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("tij,thj->thi", matrix, x)


def _rotate_back(matrix: Tensor, x: Tensor, relevance: Tensor) -> Tensor:
    share = per_unit(relevance, _rotate(matrix, x))
    return (matrix[:, None] * x[:, :, None, :] * share[..., None]).sum(2)


class GatedMlp:
    """down(silu(gate b) · up b); `names` says what its three maps are called."""

    def __init__(self, run: Propagation, names: dict[str, str]) -> None:
        self.run, self.gate, self.up, self.down = run, names["gate"], names["up"], names["down"]

    def product(self, b: Tensor) -> Tensor:
        gate = self.run.linear(self.gate, b)
        return gate * torch.sigmoid(gate) * self.run.linear(self.up, b)

    def forward(self, b: Tensor) -> Tensor:
        return self.run.linear(self.down, self.product(b))

    def back(self, b: Tensor, relevance: Tensor) -> Tensor:
        r_product = self.run.linear_back(self.down, self.product(b), relevance)
        r_gate, r_up = self.run.gate * r_product, (1 - self.run.gate) * r_product
        return self.run.linear_back(self.gate, b, r_gate) + self.run.linear_back(self.up, b, r_up)


class Mixture:
    """Experts in fused parameters, each a GatedMlp whose maps are called as its sites are."""

    def __init__(self, run: Propagation, at: str, config: Any) -> None:
        self.router, self.experts = run.state[f"{at}.gate.weight"], []
        self.k, self.to_one = config.num_experts_per_tok, getattr(config, "norm_topk_prob", True)
        for expert, fused in enumerate(run.state[f"{at}.experts.gate_up_proj"]):
            names = {part: f"{at}.experts.gate_up_proj#{expert}.{part}" for part in ("gate", "up")} | {
                "down": f"{at}.experts.down_proj#{expert}"
            }
            matrices = (*fused.chunk(2), run.state[f"{at}.experts.down_proj"][expert])
            run.state.update(
                {
                    f"{names[part]}.weight": matrix
                    for part, matrix in zip(("gate", "up", "down"), matrices, strict=True)
                }
            )
            self.experts.append(GatedMlp(run, names))

    def weights(self, b: Tensor) -> Tensor:
        """[T, experts], zero for all but the k likeliest. In float32, as transformers computes them."""
        likely = (b @ self.router.T).float().softmax(-1)
        largest, whose = (x[:, : self.k] for x in likely.sort(descending=True))
        return (
            torch.zeros_like(likely)
            .scatter(1, whose, largest / largest.sum(-1, keepdim=True) if self.to_one else largest)
            .double()
        )

    def forward(self, b: Tensor) -> Tensor:
        weights = self.weights(b)
        return torch.stack(
            [weights[:, place, None] * expert.forward(b) for place, expert in enumerate(self.experts)]
        ).sum(0)

    def back(self, b: Tensor, relevance: Tensor) -> Tensor:
        share, weights, r = per_unit(relevance, self.forward(b)), self.weights(b), torch.zeros_like(b)
        for place, expert in enumerate(self.experts):
            mine = weights[:, place] > 0
            r[mine] += expert.back(
                b[mine], weights[mine, place, None] * expert.forward(b[mine]) * share[mine]
            )
        return r


def llama(
    model: Any, ids: list[int], *, cp: bool = False, gate: float | None = None, epsilon: float = 0.0
) -> Relevance:
    """Relevance of the largest logit at the last position of a Llama, or of one with experts, or with norms of queries and keys."""
    run, config = Propagation(model, cp, gate, epsilon), model.config
    tokens, width = (
        len(ids),
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    rotations = _rotations(tokens, width, config.rope_parameters["rope_theta"])

    def norm(
        name: str, x: Tensor
    ) -> Tensor:  # a scale at each position and feature, so relevance passes it unchanged
        return (
            run.state[f"{name}.weight"] * x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        )

    def heads(x: Tensor) -> Tensor:
        return x.view(tokens, -1, width)

    def normed(name: str, x: Tensor) -> Tensor:  # of each head, or of all together
        if f"{name}.weight" not in run.state:
            return x
        return norm(name, x) if len(run.state[f"{name}.weight"]) == width else heads(norm(name, x.flatten(1)))

    def mlp_of(at: str) -> GatedMlp | Mixture:
        if f"{at}.experts.down_proj" in run.state:
            return Mixture(run, at, config)
        return GatedMlp(run, {part: f"{at}.{part}_proj" for part in ("gate", "up", "down")})

    x = run.state["model.embed_tokens.weight"][ids]
    tape = []
    for index in range(config.num_hidden_layers):
        at, mlp = f"model.layers.{index}.self_attn", mlp_of(f"model.layers.{index}.mlp")
        a = norm(f"model.layers.{index}.input_layernorm", x)
        q, k, v = (normed(f"{at}.{part}_norm", heads(run.linear(f"{at}.{part}_proj", a))) for part in "qkv")
        mixed = run.attend(_rotate(rotations, q), _rotate(rotations, k), v).flatten(1)
        o = run.linear(f"{at}.o_proj", mixed)
        b = norm(f"model.layers.{index}.post_attention_layernorm", x + o)
        down = mlp.forward(b)
        tape.append((x, a, q, k, v, mixed, o, b, mlp, down))
        x = x + o + down
    final = norm("model.norm", x)
    logits = run.linear("lm_head", final)
    relevance = torch.zeros_like(logits)
    relevance[-1, logits[-1].argmax()] = logits[-1].max()
    run.found.logit = float(logits[-1].max())
    r = run.linear_back("lm_head", final, relevance)
    for index, (x, a, q, k, v, mixed, o, b, mlp, down) in reversed(list(enumerate(tape))):
        at = f"model.layers.{index}.self_attn"
        r_mid, r_down = sum_rule(x + o, down, r)
        r_mid = r_mid + mlp.back(b, r_down)
        r, r_o = sum_rule(x, o, r_mid)
        r_mixed = heads(run.linear_back(f"{at}.o_proj", mixed, r_o))
        run.found.heads[f"{at}.o_proj"] = r_mixed.sum((0, 2))
        r_q, r_k, r_v = run.attend_back(_rotate(rotations, q), _rotate(rotations, k), v, r_mixed)
        for part, flow in (
            ("q", _rotate_back(rotations, q, r_q)),
            ("k", _rotate_back(rotations, k, r_k)),
            ("v", r_v),
        ):
            r = r + run.linear_back(f"{at}.{part}_proj", a, flow.flatten(1))
    run.found.embeddings = r.sum(1)
    return run.found


def opt(
    model: Any, ids: list[int], *, cp: bool = False, gate: float | None = None, epsilon: float = 0.0
) -> Relevance:
    """Relevance of the largest logit at the last position of an OPT with norms before each block."""
    run, config = Propagation(model, cp, gate, epsilon), model.config
    tokens, width = len(ids), config.hidden_size // config.num_attention_heads
    embedded = run.state["model.decoder.embed_tokens.weight"][ids]
    placed = run.state["model.decoder.embed_positions.weight"][torch.arange(tokens) + 2]
    x = embedded + placed
    tape = []
    for index in range(config.num_hidden_layers):
        at = f"model.decoder.layers.{index}"
        a = run.layer_norm(f"{at}.self_attn_layer_norm", x)
        q, k, v = (run.linear(f"{at}.self_attn.{part}_proj", a).view(tokens, -1, width) for part in "qkv")
        mixed = run.attend(q, k, v).flatten(1)
        o = run.linear(f"{at}.self_attn.out_proj", mixed)
        b = run.layer_norm(f"{at}.final_layer_norm", x + o)
        active = run.linear(f"{at}.fc1", b).clamp(min=0)
        down = run.linear(f"{at}.fc2", active)
        tape.append((x, a, q, k, v, mixed, o, b, active, down))
        x = x + o + down
    final = run.layer_norm("model.decoder.final_layer_norm", x)
    logits = run.linear("lm_head", final)
    relevance = torch.zeros_like(logits)
    relevance[-1, logits[-1].argmax()] = logits[-1].max()
    run.found.logit = float(logits[-1].max())
    r = run.layer_norm_back("model.decoder.final_layer_norm", x, run.linear_back("lm_head", final, relevance))
    for index, (x, a, q, k, v, mixed, o, b, active, down) in reversed(list(enumerate(tape))):
        at = f"model.decoder.layers.{index}"
        r_mid, r_down = sum_rule(x + o, down, r)
        r_active = run.linear_back(f"{at}.fc2", active, r_down)
        r_mid = r_mid + run.layer_norm_back(
            f"{at}.final_layer_norm", x + o, run.linear_back(f"{at}.fc1", b, r_active)
        )
        r, r_o = sum_rule(x, o, r_mid)
        r_mixed = run.linear_back(f"{at}.self_attn.out_proj", mixed, r_o).view(tokens, -1, width)
        run.found.heads[f"{at}.self_attn.out_proj"] = r_mixed.sum((0, 2))
        flows = zip("qkv", run.attend_back(q, k, v, r_mixed), strict=True)
        r_a = sum(run.linear_back(f"{at}.self_attn.{part}_proj", a, flow.flatten(1)) for part, flow in flows)
        r = r + run.layer_norm_back(f"{at}.self_attn_layer_norm", x, r_a)
    r_embedded, r_placed = sum_rule(embedded, placed, r)
    run.found.embeddings, run.found.positions = r_embedded.sum(1), r_placed.sum(1)
    return run.found
