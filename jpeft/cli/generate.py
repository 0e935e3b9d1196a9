"""`jpeft generate`: the text that follows a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jpeft.cli import model
from jpeft.cli.options import parse

__all__ = ["GenerateConfig", "run"]


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Complete a prompt.

    Attributes:
        prompt: the text to go on from.
        model: folder in Hugging Face format; the small embedded model when absent.
        adapter: folder that `jpeft train` or HF PEFT wrote; the model alone when absent.
        task: whose prompt to use, of an adapter that has several.
        chat: put the prompt as a user's message through the model's chat template.
        max_tokens: the most new tokens.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_p: draw from the fewest likeliest tokens whose probabilities reach this sum.
        seed: of the drawing.
        dtype: type of the computation; "auto" is bfloat16 on an accelerator and float32 on a CPU.
    """

    prompt: str
    model: str | None = None
    adapter: str | None = None
    task: int = 0
    chat: bool = False
    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    dtype: str = "auto"


def run(arguments: Sequence[str]) -> None:
    """Print the completion."""
    config = parse(GenerateConfig, arguments, "generate")
    from jpeft.train.tokens import Text

    folder = model.folder_of(config.model)
    text = Text(folder)
    apply, params = model.load_language_model(folder, config.dtype)
    bound, method = model.with_adapter(apply, params, config.adapter)
    if config.chat:
        rendered = text.chat.render([{"role": "user", "content": config.prompt}], add_generation_prompt=True)
        ids = text.tokenizer.encode(rendered, add_special_tokens=False).ids
    else:
        ids = text.encode_prompt(config.prompt)
    print(
        *model.complete(
            apply,
            bound,
            text,
            [ids],
            method,
            [config.task],
            new_tokens=config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
        )
    )
