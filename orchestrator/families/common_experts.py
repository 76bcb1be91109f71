"""Rules of mixtures that families share: router, experts one by one or of one tensor, shared experts."""

from __future__ import annotations

from typing import Any

from orchestrator.families.common import SOURCE, TARGET
from orchestrator.model.rules import (
    COLUMN,
    EXPERT_COLUMN,
    EXPERT_ROW,
    ROW,
    Fusion,
    Layers,
    Part,
    Rule,
)


def _router(router: str) -> Rule:
    """Return the rule of a router's weight, which the rank files hold in float32."""
    return Rule(
        TARGET + "mlp.router.weight",
        (Part(SOURCE + router + ".weight", ("experts", "hidden")),),
        dtype="F32",
        layers=Layers.EXPERTS,
    )


def experts(
    router: str, expert: str, up: str, gate: str, down: str, bias: str = "", *, flat_bias: bool = False
) -> tuple[Rule, ...]:
    """Return the rules of the router, in float32, and of the stacked experts. The prefix `expert` holds {expert}.

    `bias`: name of the router's bias by which experts are chosen, in float32; empty: there is none. `flat_bias`: it is stored as
    [1, experts].
    """
    chosen_by = (bias,) if bias else ()
    return (
        _router(router),
        *(
            Rule(
                TARGET + "mlp.router.e_score_correction_bias",
                (Part(SOURCE + name, ("experts",), has_first_axis=flat_bias),),
                dtype="F32",
                layers=Layers.EXPERTS,
            )
            for name in chosen_by
        ),
        Rule(
            TARGET + "mlp.fc.weight",
            (
                Part(SOURCE + expert + up + ".weight", ("expert_inter", "hidden"), EXPERT_COLUMN),
                Part(SOURCE + expert + gate + ".weight", ("expert_inter", "hidden"), EXPERT_COLUMN),
            ),
            per_expert=True,
            layers=Layers.EXPERTS,
        ),
        Rule(
            TARGET + "mlp.proj.weight",
            (Part(SOURCE + expert + down + ".weight", ("hidden", "expert_inter"), EXPERT_ROW),),
            per_expert=True,
            layers=Layers.EXPERTS,
        ),
    )


def fused_experts(
    router: str,
    source: str,
    *,
    names: tuple[str, str] = ("gate_up_proj", "down_proj"),
    transposed: bool = False,
    interleaved: bool = False,
) -> tuple[Rule, ...]:
    """Return the rules of router and experts, with biases, of two tensors of all experts with these `names` under `source`.

    `transposed`: an expert is stored as [in, out]. `interleaved`: rows of gate and up alternate; else gate comes first.
    """
    fused, last = (f"{SOURCE}{source}.{name}" for name in names)
    gate, up = (Fusion(index, 2, interleaved, transposed) for index in (0, 1))
    # A vector has no second axis to be transposed with.
    gate_bias, up_bias = (Fusion(index, 2, interleaved) for index in (0, 1))
    weight = ("expert_inter", "hidden")
    stacked: dict[str, Any] = {"per_expert": True, "layers": Layers.EXPERTS}
    biased = {**stacked, "when": {"moe.expert_bias": True}}
    down = Part(last, ("hidden", "expert_inter"), EXPERT_ROW, fusion=Fusion(transposed=transposed))
    return (
        _router(router),
        Rule(
            TARGET + "mlp.router.bias",
            (Part(SOURCE + router + ".bias", ("experts",)),),
            when={"moe.router_bias": True},
            dtype="F32",
            layers=Layers.EXPERTS,
        ),
        Rule(
            TARGET + "mlp.fc.weight",
            (Part(fused, weight, EXPERT_COLUMN, fusion=up), Part(fused, weight, EXPERT_COLUMN, fusion=gate)),
            **stacked,
        ),
        Rule(
            TARGET + "mlp.fc.bias",
            (
                Part(fused + "_bias", weight[:1], EXPERT_COLUMN, fusion=up_bias),
                Part(fused + "_bias", weight[:1], EXPERT_COLUMN, fusion=gate_bias),
            ),
            **biased,
        ),
        Rule(TARGET + "mlp.proj.weight", (down,), **stacked),
        Rule(TARGET + "mlp.proj.bias", (Part(last + "_bias", ("hidden",), fusion=Fusion()),), **biased),
    )


def shared_expert(source: str) -> tuple[Rule, ...]:
    """Return the rules of the shared expert, whose linears lie under `source` within a layer. It is split like a dense MLP."""
    prefix = SOURCE + source + "."
    up, gate = (Part(f"{prefix}{name}_proj.weight", ("shared_inter", "hidden"), COLUMN) for name in ("up", "gate"))
    return _shared((up, gate), Part(f"{prefix}down_proj.weight", ("hidden", "shared_inter"), ROW))


def fused_shared_expert(fused: str, down: str) -> tuple[Rule, ...]:
    """Return the rules of a shared expert whose gate and up are one tensor of a layer, gate first."""
    halves = ("shared_inter", "shared_inter")
    gate, up = (Part(SOURCE + fused, ("shared_inter", "hidden"), COLUMN, halves, index) for index in (0, 1))
    return _shared((up, gate), Part(SOURCE + down, ("hidden", "shared_inter"), ROW))


def _shared(fc: tuple[Part, Part], proj: Part) -> tuple[Rule, ...]:
    options: dict[str, Any] = {"when": {"moe.has_shared_expert": True}, "layers": Layers.EXPERTS}
    return (
        Rule(TARGET + "mlp.shared_expert.fc.weight", fc, **options),
        Rule(TARGET + "mlp.shared_expert.proj.weight", (proj,), **options),
    )
