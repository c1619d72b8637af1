"""Quantised numbers as left operands of the matrix unit: loaded from shared memory into registers, and converted there.

Pallas has no such load, so it is written in the instructions of the GPU. (The tests' interpreter replaces it.)

A matrix of 64 rows is multiplied from registers if each thread has pairs of float16 that are adjacent along the
contraction. A thread converts pairs of float8 that are adjacent in memory. Therefore the 128 numbers of a slot become
two operands of 64, in orders in which threads exchange nothing. float16 represents every float8 exactly.
"""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic.gpu import FragmentedArray, thread_idx, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from helix_jax.kernels.mosaic_gpu import memory
from helix_jax.kernels.mosaic_gpu.conversion import clip_to_float16
from helix_jax.kernels.mosaic_gpu.few import FEW, PRODUCT
from helix_jax.kernels.mosaic_gpu.work import ROWS, Segment

NUMBERS = 128  # of a slot in a tile
OPERANDS = 2
_LAYOUT = plgpu.Layout.WGMMA
_TILE = plgpu.RefType((plgpu.TilingTransform((8, NUMBERS)), plgpu.SwizzleTransform(128)))
_WEIGHTS = plgpu.RefType((plgpu.TilingTransform((8, ROWS)), plgpu.SwizzleTransform(128)))
_SCALES = 4  # of a slot
_SCALE_LAYOUT = FEW.reduce(0)
_SCALE_SLOTS = 4  # adjacent slots whose scales a thread has
_CHUNK = 16  # bytes that are adjacent in memory: those of others are permuted within each row of 128
_WARP, _WARPGROUP = 32, 128  # threads


def split_queries(q_XQH: Array) -> Array:
    """Arrange queries as right operands [X, operands, queries, 64] for the left operands of `load_slots`."""
    X, Q, _ = q_XQH.shape
    pairs = q_XQH.reshape(X, Q, -1, NUMBERS // 4, OPERANDS, 2).transpose(0, 2, 4, 1, 3, 5)
    return clip_to_float16(pairs.reshape(X, -1, Q, ROWS))


def restore_order(o: Array) -> Array:
    """Return results whose numbers are in the order of `load_numbers` with their numbers in the usual order."""
    return o.reshape(*o.shape[:-1], -1, OPERANDS, ROWS).swapaxes(-2, -1).reshape(o.shape)


def load_slots(tile: Any) -> list[Array]:
    """Load a tile [64 slots, 128 numbers] as two operands [64 slots, 64 numbers].

    Of each four numbers, the first operand has the first two, and the second the others, as in `split_queries`.
    """
    return _load(tile, transposed=False)


def load_numbers(tile: Any) -> list[Array]:
    """Load a tile [64 slots, 128 numbers] as two operands [64 numbers, 64 slots]: numbers of even and of odd index."""
    return _load(tile, transposed=True)


def make_zeros(queries: int) -> Array:
    """Return zeros [64, queries], to which products are added."""
    return plgpu.layout_cast(jnp.zeros((ROWS, queries), jnp.float32), PRODUCT)


def multiply_slots(tile: Any, queries: Any, group: Array | int = 0, *, one_at_a_time: bool = False) -> Array:
    """Return the products [64 slots, queries] of the numbers of a tile and queries.

    Args:
        tile: The tile [64 slots, 128 numbers].
        queries: Right operands [operands, queries, 64] of `split_queries`, in shared memory.
        group: Which 128 numbers of the queries belong to this tile.
        one_at_a_time: Whether the registers have space for one left operand only.
    """

    def multiply(refs) -> None:
        for i, operand in enumerate(load_slots(tile)):
            _add_product(refs[0], operand, queries.at[OPERANDS * group + i], one_at_a_time)

    products: Any = pl.run_state(multiply)([memory.Accumulator.init(make_zeros(queries.shape[-2]))])
    return products[0]


def add_weighted(sums: list[Array], values: list[Array], weights: Any, *, one_at_a_time: bool = False) -> list[Any]:
    """Add the weighted values [64 numbers, queries] of a tile to sums, one for each operand.

    Args:
        sums: The sums.
        values: The operands of `load_numbers`.
        weights: The weights [queries, 64 slots], in shared memory.
        one_at_a_time: Whether the registers have space for one left operand only.
    """

    def add(refs) -> None:
        for ref, operand in zip(refs, values, strict=True):
            _add_product(ref, operand, weights, one_at_a_time)

    return pl.run_state(add)([memory.Accumulator.init(x) for x in sums])


def load_scales(scales: Any) -> list[Array]:
    """Load scales [64 slots, 4] as four arrays of the slots, laid out like columns of scores."""
    types = [plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, layout=_SCALE_LAYOUT)] * _SCALES
    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=types)(
        lambda _, memory: _emit_load_scales(memory)
    )(scales)


def clear_unseen(tile: Any, segment: Segment, index: Array) -> None:
    """Set slots of a tile that no query sees to 0, because a weight of 0 times NaN is NaN."""

    @pl.when(segment.needs_mask(index))
    def _() -> None:
        _clear(tile, segment.lo - index * ROWS, segment.hi - index * ROWS)
        plgpu.commit_smem()


def store_weights(target: Any, weights: list[Array]) -> None:
    """Store weights [queries, 64 slots] one after the other in `target`, without barriers between them.

    The caller has to synchronise the threads before and after.
    """
    plgpu.inline_mgpu(arg_types=(_WEIGHTS, [FEW] * len(weights)))(
        lambda _, memory, arrays: _emit_store(memory, arrays)
    )(target, weights)


def _add_product(accumulator: Any, left: Array, right: Any, one_at_a_time: bool) -> None:
    plgpu.wgmma(accumulator, left, right.transpose((1, 0)))
    if one_at_a_time:
        plgpu.wgmma_wait(0)  # the registers of this operand are needed for the next one


def _load(tile: Any, transposed: bool) -> list[Array]:
    types = [plgpu.ShapeDtypeStruct((ROWS, ROWS), jnp.float16, layout=_LAYOUT)] * OPERANDS
    load = plgpu.inline_mgpu(arg_types=(_TILE,), return_type=types)
    return load(lambda _, memory: _emit_load(memory, transposed))(tile)


def _clear(tile: Any, first: Array, end: Array) -> None:
    scalar = plgpu.Layout.WG_SPLAT
    plgpu.inline_mgpu(arg_types=(_TILE, scalar, scalar))(
        lambda _, memory, first, end: _emit_clear(memory, first.registers.item(), end.registers.item())
    )(tile, first, end)


def _emit_load(memory: ir.Value, transposed: bool) -> list[FragmentedArray]:
    """Emit the loads and conversions of a thread.

    `ldmatrix` loads four matrices of eight slots by one chunk. Of each, a thread receives four bytes of one slot, or,
    if it transposes them, two bytes of two adjacent slots.
    """
    layout = _LAYOUT.to_mgpu()
    operands = [np.empty(layout.registers_shape((ROWS, ROWS)), object) for _ in range(OPERANDS)]
    order = ".trans" if transposed else ""
    text = f"ldmatrix.sync.aligned.m8n8.x4{order}.shared.b16 {{$0, $1, $2, $3}}, [$4];"
    for step in range(ROWS // 16):
        matrices = _emit_asm(text, 4, _emit_address(memory, step, transposed), loads=True)
        for matrix, loaded in enumerate(matrices):
            column, row = divmod(matrix, 2)
            for operand, register in zip(operands, _emit_conversion(loaded, transposed), strict=True):
                operand[0, 2 * step + column, 0, 0, row] = register  # eight columns, eight of the warp's 16 rows
    return [FragmentedArray(_registers=x, _layout=layout, _is_signed=None) for x in operands]


def _emit_address(memory: ir.Value, step: int, transposed: bool) -> ir.Value:
    """Emit the address of the chunk that this thread gives to `ldmatrix`. Eight threads give those of a matrix.

    An operand has 16 rows for each warp, which are slots or pairs of numbers, and 16 columns for each step.
    """
    thread = arith.remui(thread_idx(), _const(_WARPGROUP))
    warp, lane = arith.divui(thread, _const(_WARP)), arith.remui(thread, _const(_WARP))
    upper_matrices = arith.divui(lane, _const(16))
    if transposed:
        odd_matrix = arith.remui(arith.divui(lane, _const(8)), _const(2))
        slot = _add(_multiply(upper_matrices, 8), arith.remui(lane, _const(8)), _const(16 * step))
        chunk = _add(_multiply(warp, 2), odd_matrix)
    else:
        slot = _add(_multiply(warp, 16), arith.remui(lane, _const(16)))
        chunk = _add(upper_matrices, _const(2 * step))
    permuted = arith.xori(chunk, arith.remui(slot, _const(8)))
    return _add(_emit_start(memory), _multiply(slot, NUMBERS), _multiply(permuted, _CHUNK))


def _emit_conversion(loaded: ir.Value, transposed: bool) -> list[ir.Value]:
    """Emit the conversion of four numbers to two pairs of float16."""
    # Transposed, the bytes are the even and the odd number of a slot, and those of the next slot.
    order = "prmt.b32 all, $2, 0, 0x3120;" if transposed else "mov.b32 all, $2;"
    text = f"""{{
        .reg .b32 all; .reg .b16 low, high;
        {order} mov.b32 {{low, high}}, all;
        cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high;
    }}"""
    pair = ir.VectorType.get((2,), ir.F16Type.get())
    return [llvm.bitcast(pair, x) for x in _emit_asm(text, 2, loaded)]


def _emit_load_scales(memory: ir.Value) -> list[FragmentedArray]:
    """Emit the loads of the scales of a thread's slots."""
    layout, f32 = _SCALE_LAYOUT.to_mgpu(), ir.F32Type.get()
    place = arith.remui(thread_idx(), _const(ROWS // _SCALE_SLOTS))
    first = _add(_emit_start(memory), _multiply(place, 4 * _SCALES * _SCALE_SLOTS))
    text = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
    slots = [_emit_asm(text, 4, _add(first, _const(4 * _SCALES * i)), loads=True) for i in range(_SCALE_SLOTS)]
    arrays = []
    for of_slots in zip(*slots, strict=True):
        numbers = [arith.bitcast(f32, x) for x in of_slots]
        registers = np.empty(layout.registers_shape((ROWS,)), object)
        registers.fill(vector.from_elements(ir.VectorType.get((_SCALE_SLOTS,), f32), numbers))
        arrays.append(FragmentedArray(_registers=registers, _layout=layout, _is_signed=None))
    return arrays


def _emit_clear(memory: ir.Value, first: ir.Value, end: ir.Value) -> None:
    """Emit the stores of a thread, to half of a slot: zeros, unless first <= slot < end."""
    thread = arith.remui(thread_idx(), _const(_WARPGROUP))
    slot, half = arith.divui(thread, _const(2)), _add(_emit_start(memory), _multiply(thread, NUMBERS // 2))
    stores = "".join(f"@unseen st.shared.v4.b32 [$0 + {at}], {{0, 0, 0, 0}};" for at in range(0, NUMBERS // 2, _CHUNK))
    text = f"""{{
        .reg .pred unseen;
        setp.lt.s32 unseen, $1, $2; setp.ge.or.s32 unseen, $1, $3, unseen;
        {stores}
    }}"""
    llvm.inline_asm(None, [half, slot, first, end], text, "r,r,r,r", has_side_effects=True)


def _emit_store(memory: ir.Value, arrays: list[FragmentedArray]) -> None:
    for i, array in enumerate(arrays):
        array.store_tiled(utils.memref_slice(memory, i), swizzle=128)


def _emit_asm(text: str, results: int, operand: ir.Value, *, loads: bool = False) -> list[ir.Value]:
    """Emit PTX with several results and an operand, all of 32 bits."""
    struct = llvm.StructType.get_literal([_i32()] * results)
    constraints = ",".join(["=r"] * results + ["r"])
    value: Any = llvm.inline_asm(struct, [operand], text, constraints, has_side_effects=loads)
    return [llvm.extractvalue(_i32(), value, [i]) for i in range(results)]


def _emit_start(memory: ir.Value) -> ir.Value:
    return llvm.ptrtoint(_i32(), utils.memref_ptr(memory))


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _const(value: int) -> ir.Value:
    return arith.constant(_i32(), ir.IntegerAttr.get(_i32(), value))


def _multiply(x: ir.Value, factor: int) -> ir.Value:
    return arith.muli(x, _const(factor))


def _add(*terms: ir.Value) -> ir.Value:
    total, *others = terms
    for term in others:
        total = arith.addi(total, term)
    return total
