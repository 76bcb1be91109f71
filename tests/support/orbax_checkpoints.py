"""Tiny checkpoints of MaxText's and Flax's parameter trees, written by Orbax from the models of keras_presets.

tests/data/orbax holds them. Orbax needs JAX, hundreds of megabytes, so it is no test dependency. They were written with

    python -c 'from tests.support.orbax_checkpoints import *; write_originals("/tmp/hf")'
    python -m tests.support.orbax_checkpoints /tmp/hf

the second in an environment of its own, with orbax-checkpoint==0.12.8, jax==0.10.2 and safetensors. The trees are written out here
from MaxText's param_mapping.py (to MaxText) and convert_gemma_chkpt.py (names and axes of Gemma in Flax).
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.support.keras_presets import CONFIGS, write_hugging_face

DATA = Path(__file__).parents[1] / "data" / "orbax"
Array = np.ndarray[Any, Any]


class Case(NamedTuple):
    """A checkpoint."""

    family: str
    tree: str
    """maxtext: stacked layers; unscanned: MaxText's with a subtree per layer; flax."""
    flavor: str
    """How Orbax writes it."""
    dtype: str = "float32"


CASES = {
    "llama": Case("llama", "maxtext", "manager", "bfloat16"),
    "llama3": Case("llama3", "maxtext", "zarr3", "bfloat16"),
    "llama-unscanned": Case("llama", "unscanned", "default", "bfloat16"),
    "llama-folders": Case("llama", "maxtext", "folders", "bfloat16"),
    "mistral": Case("mistral", "maxtext", "default"),
    "qwen3": Case("qwen3", "maxtext", "standard", "bfloat16"),
    "qwen2": Case("qwen2", "maxtext", "default", "bfloat16"),
    "gemma": Case("gemma", "maxtext", "default"),
    "gemma2": Case("gemma2", "maxtext", "zarr3"),
    "gemma3": Case("gemma3", "maxtext", "default"),
    "gemma-flax": Case("gemma", "flax", "default", "bfloat16"),
    "gemma2-flax": Case("gemma2", "flax", "standard", "bfloat16"),
}


def unpack(case: str, folder: Path) -> Path:
    """The checkpoint of a case, with config.json beside it."""
    with zipfile.ZipFile(DATA / f"{case}.zip") as packed:
        packed.extractall(folder)
    return folder


def write_originals(folder: str) -> None:
    """Hugging Face folders of the families."""
    for family in CONFIGS:
        write_hugging_face(family, Path(folder) / family)


def to_maxtext(state: Mapping[str, Array], config: Mapping[str, Any], *, scanned: bool) -> dict[str, Array]:
    """MaxText's arrays by path, from Hugging Face's tensors in float32."""
    kind, hidden, layers = config["model_type"], config["hidden_size"], config["num_hidden_layers"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    is_gemma = kind.startswith("gemma")
    scaled = kind in ("llama", "mistral", "gemma", "gemma2")
    pairs = (config.get("rope_scaling") or {}).get("rope_type") == "llama3"

    def norm(name: str) -> Array:
        return state[name] + 1 if is_gemma else state[name]

    def heads(name: str) -> Array:
        return state[name].T.reshape(hidden, -1, head)

    def rotated(array: Array) -> Array:
        return np.stack(np.split(array, 2, -1), -1).reshape(array.shape) if pairs else array

    def layer(number: int) -> dict[str, Array]:
        at = f"model.layers.{number}."
        found = {
            "self_attention/query/kernel": rotated(
                heads(at + "self_attn.q_proj.weight") / np.float32(np.sqrt(head) if scaled else 1)
            ),
            "self_attention/key/kernel": rotated(heads(at + "self_attn.k_proj.weight")),
            "self_attention/value/kernel": heads(at + "self_attn.v_proj.weight"),
            "self_attention/out/kernel": state[at + "self_attn.o_proj.weight"].T.reshape(-1, head, hidden),
            "mlp/wi_0/kernel": state[at + "mlp.gate_proj.weight"].T,
            "mlp/wi_1/kernel": state[at + "mlp.up_proj.weight"].T,
            "mlp/wo/kernel": state[at + "mlp.down_proj.weight"].T,
        }
        if kind == "qwen2":
            found |= {
                f"self_attention/{name}/bias": state[f"{at}self_attn.{name[0]}_proj.bias"].reshape(-1, head)
                for name in ("query", "key", "value")
            }
        if kind in ("qwen3", "gemma3_text"):
            found |= {
                f"self_attention/{name}_norm/scale": norm(f"{at}self_attn.{name[0]}_norm.weight") for name in ("query", "key")
            }
        return found | {f"{path}/scale": norm(at + name) for path, name in _NORMS[kind].items()}

    made = {
        "token_embedder/embedding": state["model.embed_tokens.weight"] * np.float32(np.sqrt(hidden) if is_gemma else 1),
        "decoder/decoder_norm/scale": norm("model.norm.weight"),
    }
    if "lm_head.weight" in state:
        made["decoder/logits_dense/kernel"] = state["lm_head.weight"].T
    return made | _arranged([layer(number) for number in range(layers)], kind, scanned=scanned)


def _arranged(layers: list[dict[str, Array]], kind: str, *, scanned: bool) -> dict[str, Array]:
    """Arrays of the decoder by path, each layer's apart or stacked along axis 1."""
    if not scanned:
        return {f"decoder/layers_{number}/{path}": array for number, layer in enumerate(layers) for path, array in layer.items()}
    made = {}
    for prefix, suffix, members in _stacks(kind, len(layers)):
        for path, array in layers[members[0]].items():
            stack = array if suffix is None else np.stack([layers[number][path] for number in members], 1)
            first, _, rest = path.partition("/")
            made[f"decoder/{prefix}/{first}{suffix or ''}/{rest}"] = stack
    return made


_SANDWICH = {
    "pre_self_attention_norm": "input_layernorm.weight", "post_self_attention_norm": "post_attention_layernorm.weight",
    "pre_ffw_norm": "pre_feedforward_layernorm.weight", "post_ffw_norm": "post_feedforward_layernorm.weight",
}  # fmt: skip
_PRE = {
    "pre_self_attention_layer_norm": "input_layernorm.weight", "post_self_attention_layer_norm": "post_attention_layernorm.weight",
}  # fmt: skip
_NORMS = {
    "llama": _PRE, "mistral": _PRE, "qwen2": _PRE, "qwen3": _PRE, "gemma2": _SANDWICH, "gemma3_text": _SANDWICH,
    "gemma": {"pre_self_attention_norm": "input_layernorm.weight", "pre_ffw_norm": "post_attention_layernorm.weight"},
}  # fmt: skip


def _stacks(kind: str, layers: int) -> list[tuple[str, str | None, range]]:
    """Subtree, what it adds to a name (None: not stacked), and the layers of each stack."""
    if kind == "gemma2":
        return [("layers", "_local", range(0, layers, 2)), ("layers", "_global", range(1, layers, 2))]
    if kind != "gemma3_text":
        return [("layers", "", range(layers))]
    whole = layers - layers % 6
    rest: list[tuple[str, str | None, range]] = [
        (f"layers_remainder/layers_{number - whole}", None, range(number, number + 1)) for number in range(whole, layers)
    ]
    return [*((f"layers/layers_{number}", "", range(number, whole, 6)) for number in range(6)), *rest]


def to_flax(state: Mapping[str, Array], config: Mapping[str, Any]) -> dict[str, Array]:
    """Arrays of Gemma in Flax by path."""
    head, hidden = config["head_dim"], config["hidden_size"]

    def heads(name: str) -> Array:
        return state[name].reshape(-1, head, hidden).transpose(0, 2, 1)

    made = {
        "transformer/embedder/input_embedding": np.pad(state["model.embed_tokens.weight"], ((0, 3), (0, 0))),
        "transformer/final_norm/scale": state["model.norm.weight"],
    }
    for number in range(config["num_hidden_layers"]):
        at, path = f"model.layers.{number}.", f"transformer/layer_{number}/"
        made |= {
            f"{path}attn/q_einsum/w": heads(at + "self_attn.q_proj.weight"),
            f"{path}attn/kv_einsum/w": np.stack([heads(f"{at}self_attn.{name}_proj.weight") for name in "kv"]),
            f"{path}attn/attn_vec_einsum/w": state[at + "self_attn.o_proj.weight"].T.reshape(-1, head, hidden),
            f"{path}mlp/gating_einsum/w": np.stack([state[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up")]),
            f"{path}mlp/linear/w": state[at + "mlp.down_proj.weight"].T,
        }
        names = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
        if config["model_type"] == "gemma2":
            names = {
                "pre_attention_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
                "pre_ffw_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
            }  # fmt: skip
        made |= {f"{path}{name}/scale": state[f"{at}{other}.weight"] for name, other in names.items()}
    return made


def _nested(arrays: Mapping[str, Any], tree: str) -> dict[str, Any]:
    """MaxText's dictionaries within dictionaries; Gemma's flat keys, each with one array."""
    made: dict[str, Any] = {}
    for path, array in arrays.items():
        *parents, leaf = [path.rpartition("/")[0], path.rpartition("/")[2]] if tree == "flax" else path.split("/")
        place = made
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = array
    return made


def _write(case: Case, original: Path, folder: Path) -> None:
    import jax.numpy as jnp
    import orbax.checkpoint as ocp
    from safetensors import safe_open

    config = json.loads((original / "config.json").read_text())
    with safe_open(str(original / "model.safetensors"), "flax") as file:
        state = {name: np.asarray(file.get_tensor(name).astype(jnp.float32)) for name in file.keys()}  # noqa: SIM118
    arrays = to_flax(state, config) if case.tree == "flax" else to_maxtext(state, config, scanned=case.tree == "maxtext")
    tree = _nested({path: _sharded(array, case) for path, array in arrays.items()}, case.tree)
    if case.tree != "flax":
        tree = {"params": {"params": tree}}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(original / "config.json", folder)
    if case.flavor == "manager":
        whole = {**tree, "step": jnp.asarray(7), "opt_state": {"mu": tree["params"]}}
        handlers = {"items": ocp.PyTreeCheckpointHandler()}
        with ocp.CheckpointManager(folder / "run", item_names=("items",), item_handlers=handlers) as manager:
            manager.save(7, args=ocp.args.Composite(items=ocp.args.PyTreeSave(whole)))
    elif case.flavor == "standard":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "default", tree)
    else:
        import jax

        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=case.flavor != "folders", use_zarr3=case.flavor == "zarr3")
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=512 if case.flavor == "zarr3" else None), tree)
        with ocp.Checkpointer(handler) as saver:
            saver.save(folder / "items", args=ocp.args.PyTreeSave(tree, save_args=chunks))


def _sharded(array: Array, case: Case) -> Any:
    """An array over four devices, along the first two axes that they divide, unless the whole is saved from one."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    value = jnp.asarray(array, case.dtype)
    if case.flavor == "standard":
        return value
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
    axes: list[str | None] = []
    left = ["a", "b"]
    for axis, size in enumerate(value.shape):
        fits = left and size % 2 == 0 and not (value.ndim > 1 and axis == 1 and size < 8)  # never along the layers
        axes.append(left.pop(0) if fits else None)
    return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*axes)))


if __name__ == "__main__":
    import sys
    import tempfile

    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    DATA.mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        if len(sys.argv) > 2 and name not in sys.argv[2:]:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / name
            _write(case, Path(sys.argv[1]) / case.family, folder)
            with zipfile.ZipFile(DATA / f"{name}.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
                for path in sorted(folder.rglob("*")):
                    if path.is_file():
                        packed.write(path, path.relative_to(folder).as_posix())
