"""What the sweeps found, as a document."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

Results = Mapping[str, dict[str, Any]]

#: Share of the elements of 2-D weights outside embeddings that a type has to be found with; of the types that build
#: that have to be, and of those that shrink that have to go through the small cycle.
WHOLE, TYPES, CYCLES = 0.99, 0.98, 0.95


def share_found(result: dict[str, Any]) -> float:
    """Elements of matrices outside embeddings, by those and the 2-D parameters that were left out."""
    found = sum(count for kind, count in result["elements"].items() if kind in ("block", "head"))
    return found / (found + result["flat_left_out"]) if found or result["flat_left_out"] else 1.0


def goals_are_met(results: Mapping[str, Results]) -> bool:
    """Whether as many types are covered as should be."""
    built, whole, shrunk, through = _passed(results.get("discovered", {}), results.get("cycle", {}))
    return len(whole) >= TYPES * len(built) and len(through) >= CYCLES * len(shrunk)


def document(found: Results, cycled: Results) -> str:
    """The whole page."""
    import transformers

    built, whole, shrunk, through = _passed(found, cycled)
    totals = Counter[str]()
    for kind in built:
        totals.update(found[kind].get("elements", {}))
    lines = [
        "# Coverage",
        "",
        f"Made by `make coverage` with transformers {transformers.__version__}, over all {len(found)} model types that",
        "it knows. A type is built without its head, from its default configuration, on the meta device.",
        "",
        "| | types |",
        "|---|---:|",
        f"| known | {len(found)} |",
        f"| build from their default configuration | {len(built)} |",
        f"| discovered whole: at least {WHOLE:.0%} of the elements of 2-D weights outside embeddings | {len(whole)} |",
        f"| can be built small | {len(shrunk)} |",
        f"| go through the small cycle | {len(through)} |",
        "",
        "The small cycle: analyse, remove the last decile of every matrix, restore to the bit, save, load, and get the",
        "same report of the loaded model and of the folder.",
        "",
        "## Elements",
        "",
        "Of all types that build; of each they add up to its parameters.",
        "",
        "| taken for | elements |",
        "|---|---:|",
        *(f"| {_NAMES[kind]} | {count:,} |" for kind, count in totals.most_common()),
        "",
        "## What is left out",
        "",
        "| reason | parameters | types |",
        "|---|---:|---:|",
        *_reasons(found),
        "",
        "## Exceptions",
        "",
        *_exceptions("Not discovered whole", {k: _why(found[k]) for k in built if k not in whole}),
        *_exceptions("Not through the small cycle", {k: cycled[k]["error"] for k in shrunk if k not in through}),
        *_exceptions("Cannot be built small", {k: cycled[k]["unbuilt"] for k in built if k not in shrunk}),
        *_exceptions(
            "Do not build from their default configuration",
            {k: found[k]["unbuilt"] for k in found if "unbuilt" in found[k]},
        ),
    ]
    return "\n".join(lines).rstrip() + "\n"


_NAMES = {
    "block": "matrices",
    "embedding": "embeddings",
    "head": "heads",
    "convolution": "convolutions",
    "left out": "left out",
    "vectors": "vectors and scalars",
}


def _passed(found: Results, cycled: Results) -> tuple[list[str], list[str], list[str], list[str]]:
    """Types that build, those of them found whole; types that shrink, those of them that go through the cycle."""
    built, shrunk = _built(found), _built(cycled)
    whole = [kind for kind in built if _is_whole(found[kind])]
    return built, whole, shrunk, [kind for kind in shrunk if "error" not in cycled[kind]]


def _built(results: Results) -> list[str]:
    return [kind for kind, result in results.items() if "unbuilt" not in result]


def _is_whole(result: dict[str, Any]) -> bool:
    return "error" not in result and share_found(result) >= WHOLE and not result["unplaced"]


def _why(result: dict[str, Any]) -> str:
    if "error" in result:
        return result["error"]
    names = ", ".join(f"`{name}` ({reason})" for name, shape, reason in result["left_out"] if len(shape) == 2)
    return f"{share_found(result):.2%}; {names[:300]}"


def _reasons(found: Results) -> list[str]:
    parameters, kinds = Counter[str](), Counter[str]()
    for result in found.values():
        reasons = Counter(reason for _, _, reason in result.get("left_out", ()))
        parameters.update(reasons)
        kinds.update(set(reasons))
    return [f"| {reason} | {count:,} | {kinds[reason]} |" for reason, count in parameters.most_common()]


def _exceptions(title: str, reasons: Mapping[str, str]) -> list[str]:
    if not reasons:
        return []
    rows = [f"| {kind} | {_in_a_line(reason)} |" for kind, reason in reasons.items()]
    return [f"### {title}: {len(reasons)}", "", "| type | why |", "|---|---|", *rows, ""]


def _in_a_line(reason: str) -> str:
    """Fit for a cell of a table, without paths of the machine."""
    words = re.sub(r"/\S*/site-packages/", "", " ".join(reason.split()))
    return words[:200].replace("|", "/")
