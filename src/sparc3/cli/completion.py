"""Completion of commands, options, recipes and fixed values for bash, zsh and fish, from the parser."""

import argparse
from collections.abc import Iterator
from importlib import resources

SHELLS = ("bash", "zsh", "fish")

BASH = """\
_sparc3() {{
    local words="{commands}"
    if [ "$COMP_CWORD" -gt 1 ]; then
        case "${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD-1]}}" in
{cases}
            *) words="" ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _sparc3 sparc3"""
"""Script for bash, which offers files if nothing fits."""

ZSH = """\
#compdef sparc3
_sparc3() {{
    local found="{commands}"
    if (( CURRENT > 2 )); then
        case "$words[2] $words[CURRENT-1]" in
{cases}
            *) found="" ;;
        esac
    fi
    compadd -- ${{=found}}
    (( CURRENT > 2 )) && _files
}}
compdef _sparc3 sparc3"""


def write_completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The lines that a shell reads, for a parser with subcommands."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    if shell == "fish":
        return "\n".join(_fish_lines(commands))
    name, cases = "words" if shell == "bash" else "found", []
    for command, subparser in commands.choices.items():
        words: list[str] = []
        for action in subparser._actions:
            for option in action.option_strings if action.nargs != 0 else ():
                cases.append((f'"{command} {option}"', _values(action)))
            words += action.option_strings or _values(action)
        cases.append((f'"{command} "*', words))
    lines = [f'            {pattern}) {name}="{" ".join(words)}" ;;' for pattern, words in cases]
    script = BASH if shell == "bash" else ZSH
    return script.format(commands=" ".join(commands.choices), cases="\n".join(lines))


def _values(action: argparse.Action) -> list[str]:
    """The possible values of an argument with a fixed set of values."""
    if action.dest == "recipe":
        files = (resources.files("sparc3.recipe") / "bundled").iterdir()
        return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))
    return [str(choice) for choice in action.choices or ()]


def _fish_lines(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> Iterator[str]:
    for choice in commands._choices_actions:
        yield f"complete -c sparc3 -n __fish_use_subcommand -f -a {choice.dest} -d {_quote(choice.help)}"
    for command, subparser in commands.choices.items():
        start = f"complete -c sparc3 -n '__fish_seen_subcommand_from {command}'"
        for action in subparser._actions:
            names = "".join(
                f" -l {name[2:]}" if name.startswith("--") else f" -s {name[1:]}"
                for name in action.option_strings
            )
            values = f" -a {_quote(' '.join(_values(action)))}" if _values(action) else ""
            argument_flag = (
                (" -x" if values else " -r") if action.option_strings and action.nargs != 0 else ""
            )
            description = (action.help or "") % {"default": action.default}
            if names or values:
                yield f"{start}{names}{argument_flag}{values} -d {_quote(description)}"


def _quote(text: str | None) -> str:
    escaped = (text or "").replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
