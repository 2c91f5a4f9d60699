"""The kernels at the shapes at which compile_report.py compiles them: `CASES`, by operation.

Each function returns the cases of one operation for an architecture, in bf16. Launch settings are the defaults of the
operation's own file; the shapes are those of GPT-2 S, M, L, XL and of the embedded models (`models/shapes.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from stagedspec.kernels import compact, embed, ngram_lookup, verify_commit
from stagedspec.kernels.choose import likeliest
from stagedspec.kernels.choose import op as choose
from stagedspec.kernels.choose.kernel import scan_kernel, select_kernel
from stagedspec.kernels.choose.scores import COUNTERS, GROUP, NOISES
from stagedspec.kernels.common.hopper import layout
from stagedspec.kernels.common.registry import SHARED_LIMIT, most_registers
from stagedspec.kernels.grow_tree import op as grow_tree
from stagedspec.kernels.grow_tree.harvest_kernel import harvest_tree_kernel
from stagedspec.kernels.grow_tree.pass_kernel import grow_pass_kernel
from stagedspec.kernels.linear import hopper as linear_hopper
from stagedspec.kernels.linear import op as linear
from stagedspec.kernels.linear.kernel import ROWS, stat_tiles
from stagedspec.kernels.lm_head import hopper as lm_head_hopper
from stagedspec.kernels.lm_head import op as lm_head
from stagedspec.kernels.lm_head.kernel import head_kernel, norm_kernel
from stagedspec.kernels.tree_attention import hopper as attention_hopper
from stagedspec.kernels.tree_attention import op as tree_attention
from stagedspec.kernels.tree_attention.shared import INTEGERS
from stagedspec.models.shapes import SIZES, ModelShape

MODELS = {name.lower(): shape for name, shape in SIZES.items()}
HEADS = {f"{shape.vocab}x{shape.width}": shape for shape in MODELS.values()}


@dataclass(frozen=True)
class CompileCase:
    """One kernel at one shape, as `triton.compile` wants it.

    signature: argument name to type ("*bf16", "i32", "fp32"); constexprs: the compile-time arguments.
    matrix: the kernel is expected to use matrix instructions. aligned: arguments divisible by 16.
    maxnreg: registers a thread may have, see `most_registers`. spills: bytes it may spill, where that was seen to pay.
    """

    name: str
    kernel: object
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int = 4
    num_stages: int = 3
    matrix: bool = False
    aligned: tuple[str, ...] = ()
    maxnreg: int | None = None
    spills: int = 0


# ---------------------------------------------------------------- linears


def _linears() -> list[tuple[str, int, int, bool, int]]:
    """The four linears of every target: name, outputs, inputs, whether there is a LayerNorm before (else a residual
    after), activation."""
    return [
        (f"{model} {layer}", *rest)
        for model, shape in MODELS.items()
        if model != "draft"
        for layer, *rest in (
            ("qkv", 3 * shape.width, shape.width, True, 0),
            ("projection", shape.width, shape.width, False, 0),
            ("up", shape.mlp, shape.width, True, 3),
            ("down", shape.width, shape.mlp, False, 0),
        )
    ]


def linears(arch: int) -> list[CompileCase]:
    """At 16 and 64 tokens."""
    cases = []
    for name, outputs, inputs, norm, activation in _linears():
        for tokens in (16, 64):
            splits, length = linear.split_columns(outputs, inputs)
            chosen = linear.default_settings(2, tokens, length, SHARED_LIMIT[arch] >= linear.ROOMY)
            settings = {"SPLITS": splits, "SPLIT_K": length, "TOKENS": tokens}
            settings |= {key: chosen[key] for key in ("BLOCK_K", "AHEAD")}
            options = {key: chosen[key] for key in ("num_warps", "num_stages")}
            options["maxnreg"] = most_registers(arch, chosen["num_warps"], linear.SPILLING)
            kinds = dict.fromkeys(("p_x", "p_weight"), "*bf16")
            what = f"{name} {tokens}", outputs, inputs, norm, activation
            cases.append(_linear(linear._linear, *what, kinds, settings, **options))
    return cases


def linears_hopper(arch: int) -> list[CompileCase]:
    """At 8 to 64 tokens, and chunks of prompts. One more than GPT-2's: statistics of wide rows take registers."""
    cases = []
    wide = "wide qkv", 7680, 2560, True, 0
    for name, outputs, inputs, norm, activation in (*_linears(), wide) if arch == 90 else ():
        for tokens, groups in (*((tokens, 1) for tokens in (8, 16, 32, 64)), (128, 2)):
            chosen = linear_hopper.settings(tokens, inputs, groups, norm)
            chosen["LATE"] = linear_hopper.late(outputs, inputs, chosen)
            kinds = {
                key: _described(rows, chosen["BLOCK_K"]) for key, rows in (("x", tokens), ("weight", groups * ROWS))
            } | {"p_weight": "*bf16"}
            what = f"{name} {tokens}", outputs, inputs, norm, activation
            cases.append(_linear(linear_hopper._linear_hopper, *what, kinds, chosen, num_warps=4 * groups))
    return cases


def _described(rows: int, columns: int, dtype: str = "bf16") -> str:
    """The type of a tensor that is copied in blocks."""
    return f"tensordesc<{dtype}[{rows}, {columns}],{layout(rows, columns, 1 if dtype == 'fp8e4nv' else 2)!r}>"


def _linear(
    kernel,
    name: str,
    outputs: int,
    inputs: int,
    norm: bool,
    activation: int,
    kinds: dict[str, str],
    settings: dict[str, int],
    **options: int | None,
) -> CompileCase:
    """A case of either kernel. kinds: the types of x and the weight, where the two differ; settings: what else is
    constant; options: the launch's."""
    absent = ("p_residual", "p_stats_out") if norm else ("p_stats", "p_sums")
    kinds = kinds | {"p_bias": "*fp32" if norm else "*bf16", "p_residual": "*bf16", "p_out": "*bf16"}
    kinds |= dict.fromkeys(("p_stats", "p_sums", "p_stats_out", "p_partials"), "*fp32")
    kinds |= {"p_counters": "*i32", "M": "i32", "epsilon": "fp32"}
    constants = {
        "OUT": outputs, "K": inputs, "NORM": norm, "STAT_TILES": stat_tiles(inputs), "BIAS": True,
        "RESIDUAL": not norm, "ACTIVATION": activation, "STATS": not norm, "ROWS": ROWS, "PDL": False,
    } | settings  # fmt: skip
    return CompileCase(
        name,
        kernel,
        {key: kinds.get(key, "constexpr") for key in kernel.arg_names},
        constants | dict.fromkeys(absent),
        matrix=True,
        aligned=tuple(key for key, kind in kinds.items() if kind.startswith("*") and key not in absent),
        **options,
    )


# ---------------------------------------------------------------- choosing


TYPES = {
    "p_seeds": "*i64", "p_streams": "*i32", "p_positions": "*i32", "p_masses": "*i32", "p_ids": "*i32",
    "p_groups": "*i32", "p_counters": "*i32", "p_out": "*i32",
    "M": "i32", "N": "i32", "scale": "fp32", "top_p": "fp32", "min_p": "fp32",
    "epsilon": "fp32",
}  # fmt: skip


def _choosing(
    name: str, kernel, constexprs: dict, num_warps: int, num_stages: int = 3, matrix: bool = False,
    maxnreg: int | None = None, **types
):  # fmt: skip
    """A case of a kernel of `choose` or `lm_head`; pointers are fp32 unless said otherwise."""
    known = TYPES | types
    names = [argument for argument in kernel.arg_names if argument not in constexprs]
    signature = {argument: known.get(argument, "*fp32") for argument in names}
    aligned = tuple(argument for argument in names if signature[argument].startswith("*") and argument not in COUNTERS)
    return CompileCase(name, kernel, signature, constexprs, num_warps, num_stages, matrix, aligned, maxnreg)


def chooses(arch: int) -> list[CompileCase]:
    cases = []
    for vocab_size in (MODELS["l"].vocab, MODELS["target"].vocab):
        groups, slices = choose.groups_of(vocab_size), -(-vocab_size // choose.SLICE)
        shape = {"V": vocab_size, "G": groups}
        for name, choosing, noise in (("choose", True, 1), ("greedy", True, 0), ("groups", False, 0)):
            settings = {
                "T": choose.SLICE, "SLICES": slices, "SLICES_UP": triton.next_power_of_2(slices), "SCALING": noise,
                "NOISE": noise, "CHOOSE": choosing, "MASSES": not choosing, "PDL": False,
            }  # fmt: skip
            cases.append(_choosing(f"scan-{name}-{vocab_size}", scan_kernel, shape | settings, 4))
        for name, top_k, top_p, min_p, children, whole in (
            ("top_k", 50, False, False, 0, False),
            ("top_p", 0, True, False, 0, False),
            ("all", 50, True, True, 0, False),
            ("children-top_k", 50, False, False, 8, False),
            ("children", 0, False, False, likeliest.MOST + 1, True),
        ):
            wide = 1 if top_k or children else choose.WIDE
            settings = {
                "STRIDE": groups * GROUP, "GROUPS": triton.next_power_of_2(groups),
                "SCALING": int(not whole), "NOISE": int(not whole),
                "TOP_K": top_k, "TOP_P": top_p, "MIN_P": min_p, "CHILDREN": children, "WHOLE": whole,
                "BLOCK": choose.BLOCK // (2 if wide > 1 else 1), "FEW": choose.FEW, "TOGETHER": choose.TOGETHER,
                "SPAN": min(choose.SPAN * (2 if top_p else 1), triton.next_power_of_2(groups)), "WIDE": wide,
                "LANES": 32 * choose.WARPS["select_warps"], "PDL": False,
            }  # fmt: skip
            warps = choose.WARPS["select_warps"]
            registers = most_registers(arch, warps, choose.SPILLING)
            kernel = select_kernel
            cases.append(_choosing(f"select-{name}-{vocab_size}", kernel, shape | settings, warps, maxnreg=registers))
        for children in (4, 8, likeliest.MOST):
            settings = {"STRIDE": groups * GROUP, "PDL": False} | likeliest.constants(children, groups)
            warps = settings.pop("num_warps")
            kernel = likeliest.likeliest_kernel
            cases.append(_choosing(f"likeliest-{children}-{vocab_size}", kernel, shape | settings, warps))
    return cases


def lm_heads(arch: int) -> list[CompileCase]:
    cases = []
    for name, shape in HEADS.items():
        halves = dict.fromkeys(("p_x", "p_head", "p_weight", "p_bias"), "*bf16")
        constants = {"K": shape.width, "BLOCK": triton.next_power_of_2(shape.width), "PDL": False}
        cases.append(_choosing(f"norm-{name}", norm_kernel, constants, 4, **halves | {"p_out": "*bf16"}))
        groups = choose.groups_of(shape.vocab)
        for rows, warps in ((16, 4), (32, 4), (64, 8)):
            for kind, choosing, noise, store in (
                ("greedy", True, 0, 0),
                ("sampled", True, 1, 0),
                ("logits", False, 0, 1),
                ("topm", False, 1, 2),
            ):
                constants = {
                    "V": shape.vocab, "K": shape.width, "STRIDE": groups * GROUP, "G": groups,
                    "T": lm_head.default_tile(arch), "R": rows,
                    "BLOCK_K": lm_head.block_k(shape.width, torch.bfloat16), "SCALING": 0, "NOISE": noise,
                    "CHOOSE": choosing, "STORE": store, "MASSES": store == 2, "PDL": False,
                }  # fmt: skip
                registers = most_registers(arch, warps, lm_head.SPILLING)
                what = f"head-{kind}-{name}-r{rows}", head_kernel, constants, warps, 4, True, registers
                cases.append(_choosing(*what, **halves))
    return cases


def lm_heads_hopper(arch: int) -> list[CompileCase]:
    return [
        _head_hopper(name, shape, rows, *form)
        for name, shape in (HEADS.items() if arch == 90 else ())
        for rows in (8, 16, 32, 64)
        for form in (
            ("greedy", True, 0, 0, False),
            ("sampled", True, 1, 0, False),
            ("logits", False, 0, 1, False),
            ("topm", False, 1, 2, True),
            ("greedy-stored", True, 0, 1, False),
            ("sampled-stored", True, 1, 1, False),
            ("masses", False, 0, 1, True),
            ("8 bits", False, 1, 2, True),
        )
    ]


def _head_hopper(
    name: str, shape: ModelShape, rows: int, form: str, choosing: bool, noise: int, store: int, masses: bool
) -> CompileCase:
    itemsize = 1 if form == "8 bits" else 2
    chosen = lm_head_hopper.settings(rows, shape.width, noise == NOISES["made"], store == 1, itemsize)
    del chosen["PROGRAMS"]
    block, groups = chosen["BLOCK_K"], choose.groups_of(shape.vocab)
    kinds = {
        "x": _described(chosen["TOKENS"], block, "fp16" if itemsize == 1 else "bf16"),
        "head": _described(lm_head_hopper.ROWS, block, "fp8e4nv" if itemsize == 1 else "bf16"),
    }
    constants = {
        "V": shape.vocab, "STRIDE": groups * GROUP, "K": shape.width, "G": groups,
        "ROWS": lm_head_hopper.ROWS, "SCALING": 1, "NOISE": noise, "CHOOSE": choosing,
        "STORE": store, "MASSES": masses, "PDL": False,
    } | chosen  # fmt: skip
    return _choosing(f"{form}-{name}-r{rows}", lm_head_hopper._head_hopper, constants, 4, matrix=True, **kinds)


# ---------------------------------------------------------------- attention, embeddings, the cache


def attentions(arch: int) -> list[CompileCase]:
    """Few and many nodes, trees and prompts; beside the models wide heads, and heads that share keys."""
    types = {"p_qkv": "*bf16", "p_cache": "*bf16", "p_masks": "*i32", "p_prefix": "*i32", "p_acc": "*fp32"}
    types |= {"p_max": "*fp32", "p_sum": "*fp32", "p_out": "*bf16", "scale": "fp32"}
    types |= dict.fromkeys(INTEGERS, "i32")
    models = {name: (shape.heads, shape.head_size) for name, shape in MODELS.items()}
    models |= {"wide": (8, 128), "grouped": (5, 64)}
    passes = {"n1": 1, "n64": 2, "prompt": 0}
    widest = {"n256": 8, "rows1024": 32}  # the most that a tree may have: nodes, and rows that the draft evaluates
    cases = []
    for model, (heads, size) in models.items():
        tiles = tree_attention.tree_tiles(size, 2, tree_attention.WINDOW)
        for name, words in (passes | (widest if model in ("l", "wide") else {})).items():
            group = 4 if model == "grouped" else 1
            constants = {"KV_HEADS": heads, "GROUP": group, "D": size, "WORDS": words}
            constants |= {"WINDOW": tree_attention.WINDOW, "PDL": False, "FILLED": 16} | tiles
            warps, near = tree_attention.far_warps(arch, size), tree_attention.near_warps(size, 2)
            registers = tree_attention.near_registers(arch, size, near)
            kernels = [
                (tree_attention._attend_far, {"ROWS": tiles["FAR_ROWS"]}, warps, None),
                (tree_attention._attend_near, {"ROWS": tiles["NEAR_ROWS"]}, near, registers),
            ]
            if name == "prompt":
                kernels = [(tree_attention._attend_prompt, tree_attention.prompt_tiles(size, 2), warps, None)]
            for kernel, own, warps, registers in kernels:
                names = kernel.arg_names
                cases.append(
                    CompileCase(
                        f"{kernel.__name__.removeprefix('_attend_')}-{model}-{name}",
                        kernel,
                        {key: types[key] for key in names if key in types},
                        {key: value for key, value in (constants | own).items() if key in names},
                        warps,
                        matrix=True,
                        maxnreg=registers,
                        aligned=tuple(key for key in names if key.startswith("p_")),
                    )
                )
    return cases


def attentions_hopper(arch: int) -> list[CompileCase]:
    """Each of the settings, alone and in batches."""
    types = {"p_qkv": "*bf16", "p_cache": "*bf16", "p_masks": "*i32", "p_prefix": "*i32", "p_out": "*bf16"}
    types |= {"scale": "fp32"} | dict.fromkeys(INTEGERS, "i32")
    kernel, cases = attention_hopper._attend, []
    names = kernel.arg_names
    models = {name: (shape.heads, 1) for name, shape in MODELS.items() if shape.head_size == 64} | {"grouped": (5, 4)}
    passes = {"n1": (1, 1, 1), "n64": (1, 64, 2), "n256": (1, 256, 8)}  # sequences, nodes, words of a mask
    passes |= {"b16-n1": (16, 1, 1), "b8-n16": (8, 16, 1)}
    for model, (heads, group) in models.items() if arch == 90 else ():
        for name, (batch, nodes, words) in passes.items():
            chosen = attention_hopper.settings(nodes * group, batch * heads)
            registers = chosen.pop("maxnreg")
            constants = {
                "KV_HEADS": heads, "GROUP": group, "D": 64, "WORDS": words, "WINDOW": tree_attention.WINDOW,
                "CHUNK": attention_hopper.CHUNK, "CHUNKS": attention_hopper.CHUNKS,
                "SETTLED": True, "PDL": False,
            } | chosen  # fmt: skip
            cases.append(
                CompileCase(
                    f"{model}-{name}",
                    kernel,
                    {key: types.get(key, "constexpr") for key in names},
                    constants,
                    attention_hopper.CHUNKS,
                    matrix=True,
                    maxnreg=registers,
                    aligned=tuple(key for key in names if key.startswith("p_")),
                    # Two programs a multiprocessor are 5% to 8% faster; with 16 rows they spill outside the products.
                    spills=160 if not chosen["AHEAD"] and chosen["ROWS"] == attention_hopper.MOST_ROWS else 0,
                )
            )
    return cases


def embeds(arch: int) -> list[CompileCase]:
    tables = ("p_token_table", "p_position_table", "p_out")
    kinds = dict.fromkeys(("p_tokens", "p_positions"), "*i32") | dict.fromkeys(tables, "*bf16")
    kinds["p_stats"] = "*fp32"
    signature = {key: kinds.get(key, "constexpr") for key in embed._embed.arg_names}
    cases = []
    for name, shape in MODELS.items():
        constants = {"V": shape.vocab, "P": shape.positions, "D": shape.width, "PDL": False}
        constants |= {"TILES": stat_tiles(shape.width), "ROWS": ROWS}
        cases.append(CompileCase(name, embed._embed, signature, constants, aligned=tables))
    return cases


def compacts(arch: int) -> list[CompileCase]:
    """Paths of 16 nodes."""
    numbers = dict.fromkeys(("B", "S", "K", "OFFSET"), "i32")
    signature = {"p_cache": "*bf16", "p_source": "*i32", "p_target": "*i32"} | numbers
    return [
        CompileCase(
            name,
            compact._compact,
            signature,
            {"COLUMNS": 2 * shape.width, "PDL": False} | compact.tiles_of(16),
            aligned=("p_cache",),
        )
        for name, shape in MODELS.items()
    ]


# ---------------------------------------------------------------- trees


POINTERS = {
    "p_tokens": "*i32", "p_lengths": "*i32", "p_seeds": "*i64", "p_streams": "*i32", "p_keys": "*i64",
    "p_rows": "*i32", "p_table_tokens": "*i32", "p_table_logprobs": "*fp32", "p_names": "*i32", "p_values": "*fp32",
    "p_slots": "*i32", "p_masks": "*i32", "p_scores": "*fp32", "p_candidates": "*i32", "p_candidate_scores": "*fp32",
    "p_tree": "*i32", "p_batch": "*i32", "p_batch_masks": "*i32", "p_prefix": "*i32", "floor": "fp32",
    "p_contexts": "*i32", "p_sequence": "*i32", "p_logprobs": "*fp32", "p_out_tokens": "*i32",
    "p_out_logprobs": "*fp32", "p_chosen": "*i32", "p_origins": "*i8", "p_limits": "*i32", "p_running": "*i32",
    "p_active": "*i32", "p_eos": "*i32", "p_accepted": "*i32", "p_counts": "*i32", "p_target_moves": "*i32",
    "p_draft_moves": "*i32",
}  # fmt: skip


def _tree_case(name: str, kernel, constants: dict, **options) -> CompileCase:
    """A case of a kernel over trees or sequences; what is no pointer is an int32."""
    constants = constants | {"PDL": False}
    signature = {argument: POINTERS.get(argument, "i32") for argument in kernel.arg_names if argument not in constants}
    return CompileCase(name, kernel, signature, constants, **options)


def ngram_lookups(arch: int) -> list[CompileCase]:
    """The tables that fit-ngram makes by default, and none."""
    tile = {"TILE": ngram_lookup.TILE, "BLOCK": ngram_lookup.BLOCK}
    return [
        _tree_case(
            f"r={width}",
            ngram_lookup.ngram_lookup_kernel,
            {"SUCCESSORS": width, "RANKS": ngram_lookup.ranks(width)} | tile,
        )
        for width in (0, 8)
    ]


def grow_trees(arch: int) -> list[CompileCase]:
    """Trees of 16, 64 and 256 nodes with the default table, sampled, and settings that make the largest tiles and
    longest loops.

    A tree: nodes, passes, width, children, prefetch, prefetch_width.
    """
    trees = {
        "N=16": (16, 3, 4, 4, 1, 2),
        "N=64": (64, 6, 8, 8, 2, 4),
        "N=256": (256, 8, 16, 16, 2, 8),
        "levels=8": (64, 6, 2, 8, 8, 1),  # the largest that mode "staged" chooses by itself
        "levels=28": (256, 2, 2, 8, 28, 9),
        "width=128": (256, 4, 128, 8, 0, 1),
        "guesses=126": (256, 3, 2, 8, 1, 126),
        "children=4096": (256, 1, 1, 4096, 0, 1),
        "candidates=16384": (256, 4, 128, 16, 2, 64),
        "options=4096": (17, 1, 250, 16, 1, 6),
    }
    cases = []
    for name, tree in trees.items():
        cases.append(_grow_pass(arch, f"grow_pass first {name}", *tree, first=True))
        cases.append(_grow_pass(arch, f"grow_pass {name}", *tree))
        cases.append(_harvest_tree(arch, f"harvest_tree {name}", *tree))
    cases.append(_harvest_tree(arch, "harvest_tree root", 1, 0, 1, 1, 0, 1))
    return cases


def _grown(passes: int, width: int, children: int, prefetch: int, guesses: int) -> grow_tree.TreeShape:
    slots = 2 + (passes - 1) * width + passes * prefetch * guesses
    return grow_tree.TreeShape(width, prefetch, guesses, children, slots)


def _grow_pass(arch: int, name: str, nodes: int, *tree: int, first: bool = False) -> CompileCase:
    constants = grow_tree.pass_constants(_grown(*tree), 8, grow_tree.BLOCK) | {"FIRST": first, "SAMPLED": True}
    warps = grow_tree.pass_warps(grow_tree.default_warps("grow_pass", constants["CANDIDATES"]), constants)
    registers = most_registers(arch, warps, grow_tree.GROW_SPILLING)
    return _tree_case(name, grow_pass_kernel, constants, num_warps=warps, maxnreg=registers)


def _harvest_tree(arch: int, name: str, nodes: int, *tree: int) -> CompileCase:
    constants = grow_tree.harvest_constants(_grown(*tree), nodes)
    warps = grow_tree.default_warps("harvest_tree", constants["CANDIDATES"])
    registers = most_registers(arch, warps, grow_tree.HARVEST_SPILLING)
    return _tree_case(name, harvest_tree_kernel, constants, num_warps=warps, maxnreg=registers)


def verify_commits(arch: int) -> list[CompileCase]:
    """Trees of at most 32 nodes, of 64 and of 256."""
    return [
        _tree_case(
            f"N={nodes}",
            verify_commit.verify_commit_kernel,
            verify_commit.blocks_of(nodes, deepest),
            num_warps=verify_commit.default_warps(nodes),
        )
        for nodes, deepest in ((32, 8), (64, 12), (256, 30))
    ]


CASES: dict[str, Callable[[int], list[CompileCase]]] = {
    "linear": linears,
    "linear_hopper": linears_hopper,
    "embed": embeds,
    "tree_attention": attentions,
    "tree_attention_hopper": attentions_hopper,
    "compact": compacts,
    "lm_head": lm_heads,
    "lm_head_hopper": lm_heads_hopper,
    "choose": chooses,
    "ngram_lookup": ngram_lookups,
    "grow_tree": grow_trees,
    "verify_commit": verify_commits,
}
