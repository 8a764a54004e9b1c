"""Doubts about the GPU kernels that units of `bench.gpu` settle, and what follows from each answer.

Each came from reading the code without a GPU. `settled` gives the answers that a GPU has given.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deeplab_fast.tuning.runner import PASSED, Outcome

from .gpu_store import answers

YES = "yes"
NO = "no"
# Times within this much are the same.
_SAME = 1.02
_LAUNCH_BOUND = 1.15
_NEAR_COPY = 0.8
_ISSUE_LIMIT = 80.0
_NEAR_BEST = 1.05
_FOLD_SHARE = 0.1
# As built, where graphs come by themselves; then those with and without.
_OURS = ("deeplab_fast", "deeplab_fast, graphs", "deeplab_fast, no graphs")


class Known:
    """Outcomes of one GPU that say something of their units."""

    def __init__(self, outcomes: Iterable[Outcome]) -> None:
        self.outcomes = {o.unit: o for o in outcomes if answers(o)}

    def passed(self, *units: str) -> bool | None:
        """Whether all of some units passed; None where one has no answer and none failed."""
        verdicts = [
            self.outcomes[u].verdict == PASSED if u in self.outcomes else None for u in units
        ]
        if False in verdicts:
            return False
        return None if None in verdicts or not verdicts else True

    def matching(self, pattern: str) -> list[Outcome]:
        """Outcomes whose unit's name a regular expression matches from its start."""
        return [o for name, o in self.outcomes.items() if re.match(pattern, name)]

    def rows(self, pattern: str) -> dict[str, dict[str, Any]]:
        """The rows of units, by what they are of, that have a time."""
        return {
            row["what"]: row
            for o in self.matching(pattern)
            for row in o.result.get("rows", ())
            if "ms" in row
        }

    def gains(self, unit: str, like: str = "") -> dict[str, dict[str, float]]:
        """Of a unit of times: sizes -> backend -> gain over PyTorch, of sizes that match."""
        found = self.outcomes.get(unit)
        return {
            size: speed["gains"]
            for speed in (found.result.get("speeds", ()) if found else ())
            if re.search(like, size := "x".join(map(str, speed["sizes"])))
        }


# (the key of what follows, in numbers); None while there is no answer.
Said = tuple[str, str] | None


@dataclass(frozen=True)
class Doubt:
    """A question to the hardware.

    Attributes:
        name: short.
        question: what is doubted, and where.
        units: names of the units that answer, for people.
        answer: from what is known.
        follows: answer -> what is done then.
    """

    name: str
    question: str
    units: str
    answer: Callable[[Known], Said]
    follows: Mapping[str, str]


@dataclass(frozen=True)
class Settled:
    """A doubt with its answer.

    Attributes:
        doubt: the doubt.
        answer: of its `follows`.
        detail: the answer in numbers.
    """

    doubt: Doubt
    answer: str
    detail: str

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        follows = self.doubt.follows[self.answer]
        return f"{self.doubt.question} Settled: {self.answer}{detail}; therefore {follows}."


def settled(outcomes: Iterable[Outcome]) -> list[Settled]:
    """The doubts that outcomes of one GPU answer."""
    known = Known(outcomes)
    found = []
    for doubt in DOUBTS:
        said = doubt.answer(known)
        if said is not None:
            found.append(Settled(doubt, *said))
    return found


def open_doubts(outcomes: Iterable[Outcome]) -> Iterator[Doubt]:
    """The doubts without an answer."""
    known = Known(outcomes)
    return (doubt for doubt in DOUBTS if doubt.answer(known) is None)


def _fence(known: Known) -> Said:
    right = known.passed("variant nofence")
    if right is None:
        return None
    if not right:
        return "needed", _reason(known, "variant nofence")
    gain = _variant_gain(known, "nofence")
    if gain is None:
        return None
    return ("slower", f"{gain:.3f}x") if gain >= _SAME else ("free", f"{gain:.3f}x")


def _acquire(known: Known) -> Said:
    equal = known.passed("repeat row 3")
    if equal is None:
        return None
    if equal:
        return "equal", "1000 runs"
    other = known.passed("variant acquire_cluster")
    if other is None:
        return None
    return ("cured" if other else "not cured"), _reason(known, "repeat row 3")


def _variant_gain(known: Known, variant: str) -> float | None:
    plain, other = known.rows("variant default time$"), known.rows(f"variant {variant} time$")
    ratios = [plain[name]["ms"] / row["ms"] for name, row in other.items() if name in plain]
    return math.exp(statistics.fmean(map(math.log, ratios))) if ratios else None


def _few_filters(known: Known) -> Said:
    units = [f"row {row} {dtype} few filters" for row in range(3, 7) for dtype in _HALF]
    right = known.passed(*units)
    if right is None:
        return None
    wrong = [u for u in units if known.passed(u) is False]
    return (YES, "") if right else (NO, ", ".join(wrong))


def _resident(known: Known) -> Said:
    right = known.passed("residency")
    return None if right is None else (YES, "") if right else (NO, _reason(known, "residency"))


def _projection(known: Known) -> Said:
    found = known.gains("time aspp_project bfloat16 plain", r"^16x1024x65x65")
    for gains in found.values():
        if {"cuda", "triton"} <= gains.keys():
            ratio = gains["cuda"] / gains["triton"]
            return (NO if ratio >= 1 else YES), f"CUDA {ratio:.2f}x Triton"
    return None


def _padding(known: Known) -> Said:
    rows = known.rows("pytorch convolution b16 65x65")
    first, last = (rows.get(f"convolution b16 65x65 rate {r}: forward") for r in (12, 36))
    if not first or not last:
        return None
    ratio = last["ms"] / first["ms"]
    return (YES if ratio > 0.9 else NO), f"rate 36 takes {ratio:.2f} of rate 12"


def _fused(known: Known) -> Said:
    ratios, problems = [], []
    for o in known.matching("pytorch convolution"):
        rows = {row["what"]: row for row in o.result.get("rows", ())}
        for what, row in rows.items():
            plain = rows.get(what.removesuffix(" + bias + relu, fused"))
            if plain is None or plain is row or "ms" not in plain:
                continue
            if "ms" in row:
                ratios.append(row["ms"] / plain["ms"])
            else:
                problems.append(row.get("problem", ""))
    if not ratios and not problems:
        return None
    if not ratios:
        return "refused", problems[0][:120]
    middle = statistics.median(ratios)
    detail = f"{middle:.2f} of the plain convolution's time, {len(problems)} refused"
    return ("fast" if middle <= 1.1 else "slow"), detail


def _searched(known: Known) -> Said:
    rows = known.rows("pytorch convolution")
    ratios = [
        row["ms"] / rows[plain]["ms"]
        for what, row in rows.items()
        if what.endswith(", not searched")
        and (plain := what.removesuffix(", not searched")) in rows
    ]
    if not ratios:
        return None
    return (YES if max(ratios) > 1.1 else NO), f"up to {max(ratios):.2f} of the searched time"


def _classes(op: str) -> Callable[[Known], Said]:
    def answer(known: Known) -> Said:
        ratios = [
            gains["cuda"] / gains["triton"]
            for gains in known.gains(f"time {op} bfloat16 plain", r"^\d+x150x").values()
            if {"cuda", "triton"} <= gains.keys()
        ]
        if not ratios:
            return None
        ratio = statistics.median(ratios)
        return (YES if ratio < 1 else NO), f"CUDA {ratio:.2f}x Triton at 150 classes"

    return answer


def _bandwidth(known: Known) -> Said:
    copy = known.rows("pytorch ceilings").get("ceiling: copy")
    found = known.outcomes.get("time bn_act bfloat16 relu")
    for speed in found.result.get("speeds", ()) if found and copy else ():
        n, c, h, w, *_ = speed["sizes"]
        if (n, c, h, w) != (16, 256, 129, 129):
            continue
        taken = [
            speed["contestants"][b]["ms"] for b in speed["gains"] if "ms" in speed["contestants"][b]
        ]
        if taken and copy:
            # Read and written once, two bytes each.
            share = 4 * n * c * h * w / min(taken) / 1e6 / copy["gb_per_s"]
            return (YES if share >= _NEAR_COPY else NO), f"{share:.0%} of the copy's rate"
    return None


def _folding(known: Known) -> Said:
    copy = known.rows("pytorch ceilings").get("ceiling: copy")
    found = known.outcomes.get("time fold_filters bfloat16 float32")
    for speed in found.result.get("speeds", ()) if found and copy else ():
        ms = speed["contestants"].get("triton", {}).get("ms")
        if ms and copy:
            # Read in four bytes, written in two.
            share = 6 * speed["sizes"][1] / ms / 1e6 / copy["gb_per_s"]
            return (YES if share >= _NEAR_COPY else NO), f"{share:.0%} of the copy's rate"
    return None


def _launch_bound(known: Known) -> Said:
    for what, row in known.rows("ours training r50").items():
        if what.endswith(": deeplab_fast") and "wall_over_device" in row:
            ratio = row["wall_over_device"]
            detail = f"{ratio:.2f} of the kernels' time, {row['kernels']} kernels"
            return (YES if ratio > _LAUNCH_BOUND else NO), detail
    return None


def _captured(known: Known) -> Said:
    rows = known.rows("ours training r50")
    for what, row in rows.items():
        graph = rows.get(f"{what}, CUDA graph")
        if what.endswith(": deeplab_fast") and graph is not None:
            ratio = row["ms"] / graph["ms"]
            return (YES if ratio > _SAME else NO), f"{ratio:.2f}x as fast"
    return None


def _rule(known: Known) -> Said:
    found = known.matching("configure (aspp_branches|pointwise)")
    if not found:
        return None
    gains = [o.result["config"]["gain"] if o.result.get("config") else 1.0 for o in found]
    most = max(gains)
    detail = f"at most {most:.2f}x at {len(gains)} shapes"
    return (YES if most < 1.1 else NO), detail


def _issue(known: Known) -> Said:
    for o in known.matching("profile row 4"):
        for row in o.result.get("rows", ()):
            number = re.match(r"[\d.]+", row.get("issue slots", ""))
            if number:
                share = float(number[0])
                return (YES if share >= _ISSUE_LIMIT else NO), f"{share:.0f} % of issue slots"
    return None


def _conversions(known: Known) -> Said:
    for what, row in known.rows("ours inference r50 os8").items():
        if what.endswith(": deeplab_fast, no graphs") and "conversions" in row:
            count = row["conversions"]
            return (NO if count == 0 else YES), f"{count} conversions of {row['kernels']} kernels"
    return None


def _forms(known: Known) -> Said:
    """Of each class of convolutions: the form that the rule takes beside the fastest."""
    times: dict[str, dict[str, float]] = {}
    facts: dict[str, tuple[int, str]] = {}
    for what, row in known.rows("forms ").items():
        name, _, form = what.rpartition(": ")
        times.setdefault(name, {})[form] = row["ms"]
        facts[name] = row["count"], row["rule"]
    taken = least = 0.0
    worst, most = "", 1.0
    for name, by_form in times.items():
        count, rule = facts[name]
        if rule not in by_form:
            continue
        fastest = min(by_form.values())
        taken, least = taken + count * by_form[rule], least + count * fastest
        if by_form[rule] / fastest > most:
            worst, most = name, by_form[rule] / fastest
    if not least:
        return None
    detail = f"{taken / least:.3f} of the fastest forms' time, {most:.2f} at most, {worst}"
    return (YES if taken <= _NEAR_BEST * least else NO), detail


def _automatic_graphs(known: Known) -> Said:
    losses = []
    for own in _inference(known).values():
        if own.keys() >= set(_OURS):
            automatic, *others = (own[name]["ms"] for name in _OURS)
            losses.append(automatic / min(others))
    if not losses:
        return None
    most = max(losses)
    detail = f"up to {most:.2f} of the better of both"
    return (YES if most <= _NEAR_BEST else NO), detail


def _fold_cost(known: Known) -> Said:
    shares = []
    for own in _inference(known).values():
        pair = [own.get(f"deeplab_fast{what}, graphs") for what in ("", " optimize")]
        if pair[0] and pair[1]:
            shares.append(1 - pair[1]["ms"] / pair[0]["ms"])
    if not shares:
        return None
    most = max(shares)
    return (YES if most > _FOLD_SHARE else NO), f"up to {most:.0%} of a call"


def _inference(known: Known) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows of whole models by group, then by contestant."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for what, row in known.rows("ours inference").items():
        group, _, name = what.partition(": ")
        found.setdefault(group, {})[name] = row
    return found


def _reason(known: Known, unit: str) -> str:
    o = known.outcomes[unit]
    return f"{o.verdict}: {o.reason}"[:200]


_HALF = ("bfloat16", "float16")

DOUBTS = (
    Doubt(
        "fence",
        "Does the sm_90a ASPP need `fence.proxy.async` by 256 threads in every stage "
        "(aspp_sm90.cuh)?",
        "variant nofence, variant nofence time",
        _fence,
        {
            "needed": "the fence stays",
            "free": "the fence stays: PTX asks for it and it costs nothing",
            "slower": "the fence goes (the code of variant nofence), or moves to the producer",
        },
    ),
    Doubt(
        "acquire",
        "Is the default `.cta` acquire enough for barriers of a cluster (ptx.cuh, row 3)?",
        "repeat row 3, variant acquire_cluster",
        _acquire,
        {
            "equal": "it stays",
            "cured": "`.acquire.cluster` for `empty` becomes the code",
            "not cured": "row 3 leaves the table until another cause is found",
        },
    ),
    Doubt(
        "box",
        "Is a copy-engine box taller than the weight read as zeros (24 filters on rows 3 to 6)?",
        "row N DTYPE few filters",
        _few_filters,
        {
            YES: "the doubt ends",
            NO: "`multiply` pads the filters' matrix to the height of a box",
        },
    ),
    Doubt(
        "resident",
        "Are as many programs of each sm_90a row resident as its lists are made for?",
        "residency",
        _resident,
        {
            YES: "the count of `choose` stays",
            NO: "`choose` takes the count of `_aspp_sm90_residency`",
        },
    ),
    Doubt(
        "epilogue",
        "Do the tensor cores idle while both groups store (projection, 65x65, batch 16)?",
        "time aspp_project bfloat16 plain",
        _projection,
        {
            YES: "the projection is left to Triton, by its records, until there are two sets of "
            "accumulators",
            NO: "one set of accumulators is enough",
        },
    ),
    Doubt(
        "gather",
        "Do issue slots of the gathering threads limit row 4?",
        "profile row 4",
        _issue,
        {
            YES: "the tap's offset is kept over a chunk, or x comes by the copy engine's im2col",
            NO: "the gather stays; the profile says what limits",
        },
    ),
    Doubt(
        "padding",
        "Does cuDNN multiply the padding of dilated convolutions?",
        "pytorch convolution b16 65x65",
        _padding,
        {
            YES: "kernels of live taps have up to 1.7 times less to do than cuDNN",
            NO: "cuDNN skips it, and only fusion is left to gain",
        },
    ),
    Doubt(
        "fused",
        "Does cuDNN's fused convolution, bias and ReLU run on 2.11 at the ASPP's shapes?",
        "pytorch convolution",
        _fused,
        {
            "fast": "it stays the choice for convolutions of the backbone",
            "slow": "a plain convolution and one elementwise pass is a candidate beside it",
            "refused": "_cudnn.py runs plain convolutions there",
        },
    ),
    Doubt(
        "search",
        "Is cuDNN's choice without a search slower?",
        "pytorch convolution",
        _searched,
        {
            YES: "`predict` and `optimize` ask for the search",
            NO: "nobody needs to ask for the search",
        },
    ),
    Doubt(
        "classes",
        "Does `sum_gradients` in CUDA C++ read 150 classes too often (loss)?",
        "time upsample_cross_entropy bfloat16 plain",
        _classes("upsample_cross_entropy"),
        {YES: "Triton runs there, by its records", NO: "it stays as it is"},
    ),
    Doubt(
        "table",
        "Does a table of 90 KB leave CUDA's confusion too few blocks (150 classes)?",
        "time upsample_confusion bfloat16 plain",
        _classes("upsample_confusion"),
        {YES: "Triton runs there, by its records", NO: "it stays as it is"},
    ),
    Doubt(
        "bandwidth",
        "Do the batch norm passes fill the memory?",
        "time bn_act bfloat16 relu, pytorch ceilings",
        _bandwidth,
        {
            YES: "the constants stay",
            NO: "BYTES_IN_FLIGHT is doubled",
        },
    ),
    Doubt(
        "fold",
        "Does `fold_filters` fill the memory although it reads contiguous 3x3 filters 9 elements "
        "apart?",
        "time fold_filters bfloat16 float32, pytorch ceilings",
        _folding,
        {
            YES: "the tiles stay",
            NO: "tiles by pair are read in the order of memory and turned in shared memory",
        },
    ),
    Doubt(
        "launch",
        "Is a training step by the fused forms bound by launches?",
        "ours training r50 os16 b16 513",
        _launch_bound,
        {
            YES: "the step needs fewer launches (cuda_graph, foreach passes) first",
            NO: "faster kernels make a faster step",
        },
    ),
    Doubt(
        "graph",
        "Does a captured training step (cuda_graph) take less time than its launches one by one?",
        "ours training r50 os16 b16 513",
        _captured,
        {
            YES: "the README says what cuda_graph gains",
            NO: "the README advises cuda_graph for smaller models only",
        },
    ),
    Doubt(
        "layouts",
        "Does a model in channels_last convert layouts?",
        "ours inference r50 os8 b1 520",
        _conversions,
        {YES: "the layer that does is found in the profile", NO: "it stays as it is"},
    ),
    Doubt(
        "forms",
        "Does the rule for forms of folded convolutions take the fastest (ops/folded_conv.py)?",
        "forms",
        _forms,
        {
            YES: "the order of forms stays",
            NO: "the order follows the measured classes",
        },
    ),
    Doubt(
        "automatic",
        "Do CUDA graphs come by themselves where they are faster (program/graphs.py)?",
        "ours inference",
        _automatic_graphs,
        {
            YES: "the rule by the host's share stays",
            NO: "the share from which launches dominate is set by the measured calls",
        },
    ),
    Doubt(
        "share",
        "Does folding at every call take more than a tenth of it?",
        "ours inference",
        _fold_cost,
        {
            YES: "the README sends those who never change weights to `optimize`",
            NO: "a model by itself is as good as `optimize`",
        },
    ),
    Doubt(
        "rule",
        "Is the short rule for launch configurations enough?",
        "configure",
        _rule,
        {
            YES: "it stays, with the measured exceptions in the records",
            NO: "the measured configurations rule where they are recorded, and the rule is revised",
        },
    ),
)
