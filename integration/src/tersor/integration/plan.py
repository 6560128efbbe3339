"""A plan: one recipe per package, from a TOML file, a name or a dictionary; checked whole before any work."""

import inspect
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tersor.integration import catalogue
from tersor.integration.errors import UserError, near_match

# What a causal language model can use. The other packages serve images, image models and data sets.
STAGES = ("quant", "kvcache", "decoding", "lossless")


@dataclass(frozen=True)
class Plan:
    """One recipe per package for a causal language model.

    >>> plan = Plan.load({"quant": {"recipe": "rtn", "bits": 4}, "decoding": {"recipe": "prompt_lookup"}})
    >>> sorted(plan.recipes)
    ['decoding', 'quant']

    Args:
        name: what reports call it.
        settings: package -> {"recipe": name, knob: value, ...}, as written.
        recipes: package -> the Recipe that these settings make.
    """

    name: str
    settings: Mapping[str, Mapping[str, Any]]
    recipes: Mapping[str, Any]

    @classmethod
    def load(cls, source: "str | Path | Mapping[str, Mapping[str, Any]]" = "default") -> "Plan":
        """The plan of that name, TOML file or dictionary.

        Raises:
            UserError: unknown plan, package, recipe or knob (with the near match), or a value that a piece refuses.
        """
        name, table = ("custom", source) if isinstance(source, Mapping) else _read(str(source))
        return cls(name, table, {package: _make(name, package, choice) for package, choice in table.items()})

    def apply(
        self, model: Any, calibration: Any = None, *, progress: Callable[[int, int, str], None] | None = None
    ) -> Any:
        """`model` with the plan's changes to its modules; calibration is token ids, (sequences, length)."""
        if "quant" in self.recipes:
            from tersor.quant import quantize

            model = quantize(model, self.recipes["quant"], calibration, progress=progress)
        return model

    def cache(self, model: Any) -> Any:
        """A new, empty KV cache for `model`: the plan's, or transformers' own."""
        if "kvcache" in self.recipes:
            from tersor.kvcache import CompressedCache

            return CompressedCache(model.config, self.recipes["kvcache"])
        from transformers import DynamicCache

        return DynamicCache(config=model.config)

    def generate(self, model: Any, input_ids: Any, max_new_tokens: int) -> Any:
        """Greedy continuation of `input_ids` (1, seq) with the plan's cache and decoder: (1, seq + new)."""
        options = {"past_key_values": self.cache(model), "max_new_tokens": max_new_tokens, "do_sample": False}
        if "decoding" in self.recipes:
            options["custom_generate"] = self.recipes["decoding"]
        with self._attention(model):
            return model.generate(input_ids, **options)

    def _attention(self, model: Any) -> AbstractContextManager[Any]:
        # models that compute attention in a way of their own decode their cache first
        if "kvcache" not in self.recipes or not model._supports_sdpa:
            return nullcontext()
        from tersor.kvcache import packed_attention

        return packed_attention(model)


def names() -> list[str]:
    """Plans that ship with tersor."""
    return sorted(entry.name.removesuffix(".toml") for entry in files("tersor.integration").joinpath("plans").iterdir())


def _read(source: str) -> tuple[str, dict[str, Any]]:
    if source in names():
        text, name = files("tersor.integration").joinpath("plans", f"{source}.toml").read_text(), source
    elif Path(source).is_file():
        text, name = Path(source).read_text(), Path(source).stem
    elif source.endswith(".toml"):
        raise UserError(f"plan file {source} does not exist")
    else:
        raise UserError(f"no plan {source!r}{near_match(source, names())}; or name a TOML file")
    try:
        return name, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"plan {source}: not TOML: {error}") from error


def _make(plan: str, package: str, choice: Any) -> Any:
    """The Recipe that one table of a plan asks for."""
    where = f"plan {plan!r}, [{package}]"
    if package not in STAGES:
        known = package in catalogue.packages()
        reason = ": it does not apply to a causal language model" if known else near_match(package, STAGES)
        raise UserError(f"{where}: no such stage of a language model's plan{reason}")
    if not isinstance(choice, Mapping) or not isinstance(choice.get("recipe"), str):
        raise UserError(f'{where}: needs recipe = "NAME"; there are: {", ".join(catalogue.recipes(package))}')
    function = catalogue.recipe(package, choice["recipe"])
    knobs = {key: value for key, value in choice.items() if key != "recipe"}
    _check(where, choice["recipe"], function, knobs)
    try:
        return function(**knobs)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from error


def _check(where: str, recipe: str, function: Callable[..., Any], knobs: Mapping[str, Any]) -> None:
    hints, known = typing.get_type_hints(function), inspect.signature(function).parameters
    for key, value in knobs.items():
        if key not in known:
            raise UserError(f"{where}: recipe {recipe!r} has no setting {key!r}{near_match(key, known)}")
        allowed = set(_plain_types(hints.get(key, object)))
        if float in allowed:
            allowed.add(int)
        if object not in allowed and type(value) not in allowed:
            wanted = " or ".join(sorted(t.__name__ for t in allowed if t is not types.NoneType))
            raise UserError(f"{where}: {key} must be {wanted}, got {value!r}")


def _plain_types(hint: Any) -> Iterable[type]:
    """The plain types that a TOML value may have for `hint`; what is not plain is left to the recipe to check."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return [t for part in typing.get_args(hint) for t in _plain_types(part)]
    if origin is typing.Literal:
        return [type(value) for value in typing.get_args(hint)]
    return [hint] if hint in (int, float, bool, str, types.NoneType) else [object]
