"""Train the embedded demo model: tokenizer and Llama, from the generator's text alone. Seeded; about ten
minutes on 2 cores.

python scripts/train_demo_model.py [--out src/sparc3/demo/sparc3-demo]
python scripts/train_demo_model.py --layers 8 --width 96 --mlp 256 --row 512 --out DIR     another one, of
docs/reproducing.md
"""

import argparse
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparc3.demo.text import texts


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )


def single_rows(tokenizer: PreTrainedTokenizerFast, batch: int, length: int) -> Iterator[torch.Tensor]:
    """Batches of one document a row, every other one about an indirect object; padded on the right.

    Copying the right name is learned far sooner when no other document's names are in sight.
    """
    documents, gifts = texts("mixture", "train", seed=1), texts("ioi", "train", seed=1)
    while True:
        batch_texts = [
            next(source).text + "\n\n"
            for source in itertools.islice(itertools.cycle((documents, gifts)), batch)
        ]
        yield tokenizer(batch_texts, return_tensors="pt", padding=True, truncation=True, max_length=length)[
            "input_ids"
        ]


def make_rows(tokenizer: PreTrainedTokenizerFast, many: int, length: int) -> torch.Tensor:
    """`many` rows of so many tokens: the start mark, then whole documents joined by a blank line, the last
    one cut."""
    rows: list[list[int]] = []
    row: list[int] = []
    for document in texts("mixture", "train"):
        row += tokenizer(document.text + "\n\n", add_special_tokens=False)["input_ids"]
        if len(row) >= length - 1:
            rows.append([tokenizer.bos_token_id, *row[: length - 1]])
            row = []
            if len(rows) == many:
                return torch.tensor(rows)
    raise AssertionError("the generator does not end")


@torch.no_grad()
def ioi_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    right = 0
    for made in itertools.islice(texts("ioi", "validation"), 100):
        logits = model(**tokenizer(made.prompt, return_tensors="pt", return_token_type_ids=False)).logits[
            0, -1
        ]
        target, contrast = (
            tokenizer(name, add_special_tokens=False)["input_ids"][0] for name in (made.target, made.contrast)
        )
        right += int(logits[target] > logits[contrast])
    return right / 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("src/sparc3/demo/sparc3-demo"))
    parser.add_argument(
        "--steps", type=int, default=1400, help="steps on rows of one and of many documents in turn"
    )
    parser.add_argument("--warm", type=int, default=300, help="steps before, on rows of one document")
    parser.add_argument(
        "--batch",
        type=int,
        default=32,
        help="rows of many documents in a step, where they have 160 tokens; longer ones are fewer",
    )
    parser.add_argument("--row", type=int, default=160, help="tokens of a training row")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--mlp", type=int, default=512, help="neurons of a layer")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--sparsity", type=float, default=0.02, help="weight of the mean |MLP activation| in the loss"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    documents = [d.text for d in itertools.islice(texts("mixture", "train"), 20_000)]
    tokenizer = train_tokenizer(documents, vocab_size=896)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    batch_rows = args.batch * 160 // args.row
    rows = make_rows(tokenizer, (args.steps // 2 + 1) * batch_rows, args.row)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}, "
        f"{rows.numel():,} tokens"
    )

    activity: list[torch.Tensor] = []
    if args.sparsity:
        for layer in model.model.layers:
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda _, inputs: activity.append(inputs[0].abs().mean())
            )

    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    warmup, steps = 50, args.warm + args.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(s / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, s / steps))))
    )
    singles = single_rows(tokenizer, 2 * args.batch, args.row)
    began = time.time()
    for step in range(steps):
        # From then on both kinds of rows take turns: single documents are what prompts look like, packed ones
        # what perplexity sees.
        packed = (step - args.warm) // 2 * batch_rows
        batch = next(singles) if step < args.warm or step % 2 else rows[packed : packed + batch_rows]
        loss = model(input_ids=batch, labels=batch.masked_fill(batch == tokenizer.pad_token_id, -100)).loss
        total = loss + args.sparsity * torch.stack(activity).mean() if activity else loss
        activity.clear()
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 199:
            print(f"  indirect objects right: {ioi_accuracy(model, tokenizer):.0%}", flush=True)
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.4f}, {time.time() - began:.0f} s", flush=True)

    model.eval().to(torch.float16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
