# SPDX-License-Identifier: Apache-2.0
"""The command line: `tunix-gemma4 COMMAND ...` or `python -m tunix_gemma4 COMMAND ...`."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; 2 for what the user can mend."""
    parser = _parser()
    options, options.rest = parser.parse_known_args(arguments)
    if "words" in options:
        # Those behind a flag too, which argparse takes for something else.
        words = options.words + [word for word in options.rest if word[:1] != "-"]
        options.rest = [word for word in options.rest if word[:1] == "-"]
        options.overrides = [word for word in words if re.match(r"[\w.]+=", word)]
        options.recipes = [word for word in words if word not in options.overrides]
    # `parity` reads its own arguments; argparse's REMAINDER would refuse an option put first.
    if options.rest and options.command != "parity":
        parser.error(f"unrecognized arguments: {' '.join(options.rest)}")
    if options.command == "run":
        return _run(options)  # A program's errors keep their tracebacks.
    try:
        return options.run(options)
    except BaseException as error:
        code = _exit_code(error)
        if code is None:
            raise
        if not _answers(error):
            traceback.print_exc()
        message = _message(error, anew=options.command.startswith("demo"))
        print(f"tunix-gemma4 {options.command}: {message}", file=sys.stderr)
        stop = sys.modules.get(f"{__package__}.plugin.stop")
        if stop is not None and stop.at_once():
            # Python would wait for the thread of a rollout, or of a reward that never returns.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code


# What says by itself what is wrong. Of anything else the traceback comes first.
_ANSWERED = (ValueError, OSError, KeyboardInterrupt, SystemExit)


def _answers(error: BaseException) -> bool:
    """Whether its message suffices: of the kinds above, and of this package's own."""
    return isinstance(error, _ANSWERED) or type(error).__module__.startswith(f"{__package__}.")


def _exit_code(error: BaseException) -> int | None:
    """2 for what the user can mend, 130 and 143 for signals, 1 for the rest; None: not ours."""
    if isinstance(error, SystemExit | KeyboardInterrupt):
        interrupted = 130 if isinstance(error, KeyboardInterrupt) else None
        return getattr(error, "exit_code", interrupted)
    if isinstance(error, GeneratorExit):
        return None
    return 2 if isinstance(error, ValueError) else 1


def _message(error: BaseException, *, anew: bool = False) -> str:
    """What went wrong, and how the run goes on; `anew`: it does not, but starts elsewhere."""
    said = str(error)
    if not _answers(error):
        said = f"{type(error).__name__}: {said.strip().partition(chr(10))[0]}"
    elif isinstance(error, OSError) and error.filename is None:
        said = f"{type(error).__name__}: {said}"
    notes = () if anew else getattr(error, "of_run", ())
    return "\n".join([said or "stopped", *notes])


# Whose fields the help of a command explains.
_SFT, _GRPO = "RunConfig", "GrpoRunConfig"


class _Once(argparse.Action):
    """Stores what stands behind an option, or in its place, and refuses a second one."""

    given = False

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if option_string is not None and self.given:
            earlier = getattr(namespace, self.dest)
            parser.error(
                f"{option_string}: expected once, found {earlier} and then {values}; give one"
            )
        self.given = option_string is not None
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    """One, and those of its commands, whose options are given once if nothing else is said.

    Attributes:
        kinds: classes of settings of `recipes`, which the command takes and its help explains.
    """

    kinds: tuple[str, ...] = ()

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.register("action", None, _Once)

    def format_help(self) -> str:
        return super().format_help() + "".join(map(_settings, self.kinds))


def _settings(kind: str) -> str:
    from . import recipes
    from .settings.reference import help_text

    lines = help_text(getattr(recipes, kind))
    return "\n".join(["", f"settings ({kind}), each as KEY=VALUE, with defaults:", *lines, ""])


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tunix-gemma4", description="Fine-tune Gemma 4 on text and images in JAX."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    _add_training(commands)
    _add_tools(commands)
    return parser


def _add(commands: Any, name: str, about: str, run: Any, *kinds: str, **words: Any) -> Any:
    """A command that `run` runs; `words` say what argparse should know of recipes and settings."""
    parser = commands.add_parser(name, help=about)
    parser.set_defaults(run=run)
    parser.kinds = kinds
    parser.add_argument("words", **words)
    return parser


def _recipes_and(such_as: str) -> dict[str, str]:
    """What a run is told: recipes from left to right, settings last."""
    about = f"names of recipes, YAML files, and settings, which override them; {such_as}"
    return {"nargs": "+", "metavar": "RECIPE|KEY=VALUE", "help": about}


def _add_training(commands: Any) -> None:
    for name, about, whose, kind in (
        ("demo", "teach a tiny model to read digits", "both stages", _SFT),
        ("demo-rl", "let rewards teach a tiny model to read digits", "the rewards' part", _GRPO),
    ):
        words = {
            "nargs": "*",
            "metavar": "KEY=VALUE",
            "help": f"settings of {whose}, which has some of its own",
        }
        demo = _add(commands, name, f"{about}, in minutes", _demo, kind, **words)
        place = f"outputs/{name}"
        demo.add_argument("--output-dir", default=place, help="a number is added if it exists")

    such_as = _recipes_and("such as lora-image e2b v5e-8 lora.rank=32")
    _add(commands, "sft", "fine-tune on conversations", _train, _SFT, **such_as)
    such_as = _recipes_and("such as gsm8k e2b v5e-8 lora.rank=32")
    about = "train with rewards (GRPO, GSPO, Dr.GRPO, DAPO)"
    _add(commands, "grpo", about, _train, _GRPO, **such_as)


def _add_tools(commands: Any) -> None:
    such_as = _recipes_and("and topology=v5e:2x4 (or h200:8, cpu:8), images=1 in a row")
    about = "what a recipe takes on chips that are not here"
    plan = _add(commands, "plan", about, _plan, _SFT, _GRPO, **such_as)
    for option, about in (
        ("--json", "print one JSON object"),
        ("--search", "also seek the greatest length and rows that fit"),
        ("--weights", "weights and optimizer alone: compiles nothing"),
    ):
        plan.add_argument(option, action="store_true", help=about)

    about = "such as lora-image e2b; prints what they say"
    words = {"nargs": "*", "metavar": "RECIPE", "help": about}
    _add(commands, "recipes", "list the recipes of sft and grpo, or print some", _recipes, **words)

    program = commands.add_parser(
        "run",
        help="run a Tunix program as it is, with Gemma 4 at home in it",
        usage="tunix-gemma4 run MODULE|SCRIPT.py [ARGUMENT ...]",
    )
    program.add_argument("target", help="such as tunix.cli.grpo_main, or the path of a script")
    program.add_argument("arguments", nargs=argparse.REMAINDER, help="handed to it as they are")

    parity = commands.add_parser(
        "parity", help="compare a checkpoint with transformers, layer by layer", add_help=False
    )
    parity.set_defaults(run=_parity)

    generate = commands.add_parser("generate", help="answer a prompt")
    generate.add_argument("model", help="a checkpoint directory with a chat template")
    generate.add_argument("prompt", help="what the user says")
    generate.add_argument("--image", action="append", default=[], help="a file; may be repeated")
    generate.add_argument("--adapter", help="a directory that save_adapter or PEFT wrote")
    generate.add_argument("--max-new-tokens", type=int, default=256)
    generate.add_argument("--max-soft-tokens", type=int, help="most tokens per image")
    generate.add_argument("--thinking", action="store_true", help="think before answering")
    generate.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    generate.add_argument("--top-k", type=int)
    generate.add_argument("--top-p", type=float)
    generate.add_argument("--seed", type=int, default=0)
    generate.set_defaults(run=_generate)


def _demo(options: argparse.Namespace) -> int:
    name = f"{__package__}.demos.{options.command.replace('-', '_')}"
    overrides = (*options.recipes, *options.overrides)
    return importlib.import_module(name).run(options.output_dir, overrides)


def _train(options: argparse.Namespace) -> int:
    from . import recipes

    loads = {"sft": recipes.load_run_config, "grpo": recipes.load_grpo_config}
    config = loads[options.command](options.recipes, options.overrides)
    getattr(recipes, options.command).run(config)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from .planning import command as plan_command

    return plan_command.run(options)


def _recipes(options: argparse.Namespace) -> int:
    from .settings.load_config import recipe_list, recipe_text

    if options.overrides:
        raise ValueError(f"{options.overrides[0]}: expected names of recipes or YAML files")
    try:
        text = recipe_text(options.recipes).rstrip() if options.recipes else recipe_list()
        print(text, flush=True)
    except BrokenPipeError:  # What reads it, such as `head`, has read enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _run(options: argparse.Namespace) -> int:
    from .plugin.register import run

    run(options.target, options.arguments)
    return 0


def _parity(options: argparse.Namespace) -> int:
    from .testing import parity

    return parity.main(options.rest)


def _generate(options: argparse.Namespace) -> int:
    from .checkpoint import load_checkpoint
    from .config.domains import require
    from .data.processor import Processor
    from .lora import describe, load_adapter
    from .lora.peft import check_adapter
    from .sampling import check_settings, generate, refuse_nonfinite

    sampling = (options.temperature, options.top_k, options.top_p)
    check_settings(options.max_new_tokens, *sampling)
    require(seed=options.seed)
    if options.adapter is not None:
        check_adapter(options.adapter)
    processor = Processor.from_pretrained(
        options.model, options.max_soft_tokens, thinking=options.thinking
    )
    content = [{"type": "image", "image": path} for path in options.image]
    content.append({"type": "text", "text": options.prompt})
    prompt = processor([[{"role": "user", "content": content}]], add_generation_prompt=True)
    # An adapter may reach the vision tower even where this prompt has no image.
    text_only = not options.image and options.adapter is None
    model = load_checkpoint(options.model, text_only=text_only)
    if options.adapter is not None:
        model = load_adapter(model, options.adapter)
        print(describe(model))
    said = generate(
        model,
        prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stop_ids=processor.stop_ids,
    )
    refuse_nonfinite(model, said, options.model)
    print(processor.decode(said.rows()[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
