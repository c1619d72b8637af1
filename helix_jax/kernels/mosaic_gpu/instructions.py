"""Loads and stores between registers and shared memory that Pallas lacks, written in the instructions of the GPU.

The tests' interpreter replaces the functions without an underscore. None of them contains a barrier of the warpgroup:
the caller has to synchronise the threads before and after.

A matrix of 64 rows is multiplied from registers if each thread has pairs of 16-bit numbers that are adjacent along the
contraction. A thread converts pairs of float8 that are adjacent in memory. Therefore the 128 numbers of a slot become
two operands of 64, in orders in which threads exchange nothing. float16 represents every float8 exactly.

In a tile of slots in shared memory, eight slots by 128 bytes are adjacent (an atom), in the permutation of the matrix
unit. It begins at a multiple of 1,024 bytes.
"""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic.gpu import FragmentedArray, thread_idx, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from helix_jax.kernels.mosaic_gpu.few import FEW, PRODUCT
from helix_jax.kernels.mosaic_gpu.work import ROWS

NUMBERS = 128  # of a slot, which are loaded at once
OPERANDS = 2  # which they become
EXACT_NUMBERS = 16  # of 16 bits, of a slot, which are loaded at once
_LAYOUT = plgpu.Layout.WGMMA
_SWIZZLE = plgpu.SwizzleTransform(128)
_FLOAT8_TILE = plgpu.RefType((plgpu.TilingTransform((8, NUMBERS)), _SWIZZLE))
_FLOAT16_TILE = plgpu.RefType((plgpu.TilingTransform((8, ROWS)), _SWIZZLE))
_PLAIN, _SCALAR = plgpu.RefType(), plgpu.Layout.WG_SPLAT
_PER_QUERY, _PER_SLOT = FEW.reduce(1), PRODUCT.reduce(1)
_ATOM_SLOTS, _ATOM_BYTES = 8, 128  # of each slot
_CHUNK = 16  # bytes that stay adjacent: the chunks of each 128 bytes are permuted
_WARP, _WARPGROUP = 32, 128  # threads
_WARP_ROWS = 16  # of a matrix of 64
_STEPS = range(ROWS // 16)  # of 16 columns of a matrix


def load_numbers(tile: Any, group: Array | int, *, transposed: bool, few_registers: bool = False) -> list[Array]:
    """Load 128 numbers of a tile [64 slots, groups of 128 float8] as two operands [64, 64] of float16.

    If they are transposed, an operand has the numbers of even or odd index as rows, and slots as columns. Otherwise it
    has slots as rows; of each four numbers, the first operand has the first two, and the second the others.

    Args:
        tile: The tile.
        group: Which 128 numbers of each slot.
        transposed: Whether the operands have slots as columns.
        few_registers: Whether to compute the addresses of later steps from the first one, which takes fewer registers
            and more instructions.
    """
    types = [plgpu.ShapeDtypeStruct((ROWS, ROWS), jnp.float16, layout=_LAYOUT)] * OPERANDS
    load = plgpu.inline_mgpu(arg_types=(_FLOAT8_TILE, _SCALAR), return_type=types)

    def emit(_, memory: ir.Value, group: FragmentedArray) -> list[FragmentedArray]:
        emit_addresses = _emit_transposed_addresses if transposed else _emit_addresses
        return _emit_load(emit_addresses(memory, group.registers.item(), few_registers), transposed)

    return load(emit)(tile, jnp.int32(group))


def load_exact(tile: Any, group: Array) -> Array:
    """Load 16 numbers of a tile [64 slots, 64 bfloat16] as an operand [64 slots, 16]."""
    type_ = plgpu.ShapeDtypeStruct((ROWS, EXACT_NUMBERS), jnp.bfloat16, layout=_LAYOUT)
    load = plgpu.inline_mgpu(arg_types=(_FLOAT16_TILE, _SCALAR), return_type=type_)
    return load(lambda _, memory, group: _emit_load_exact(memory, group.registers.item()))(tile, group)


def load_scales(scales: Any, group: Array) -> Array:
    """Load the scales of a group from [64 slots, groups], laid out like the rows of a product."""
    type_ = plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, layout=_PER_SLOT)
    load = plgpu.inline_mgpu(arg_types=(_PLAIN, _SCALAR), return_type=type_)
    return load(lambda _, memory, group: _emit_load_scales(memory, group.registers.item()))(scales, group)


def store_scales(target: Any, scales: Array) -> None:
    """Store scales that are laid out like the rows of a product."""
    plgpu.inline_mgpu(arg_types=(_PLAIN, _PER_SLOT))(lambda _, memory, scales: _emit_store_scales(memory, scales))(
        target, scales
    )


def store_weights(target: Any, weights: list[Array], factors_target: Any, factors: Array) -> None:
    """Store weights [queries, 64 slots] one after the other in `target`, and a factor per query."""
    types = _FLOAT16_TILE, [FEW] * len(weights), _PLAIN, _PER_QUERY
    plgpu.inline_mgpu(arg_types=types)(lambda _, *arguments: _emit_store_weights(*arguments))(
        target, weights, factors_target, factors
    )


def clear(tile: Any, group: Array | int, first: Array, end: Array) -> None:
    """Set 128 numbers of a tile [64 slots, groups of 128 float8] to 0, except in slots from `first` to `end`."""
    plgpu.inline_mgpu(arg_types=(_FLOAT8_TILE, _SCALAR, _SCALAR, _SCALAR))(
        lambda _, memory, *scalars: _emit_clear(memory, *[x.registers.item() for x in scalars])
    )(tile, jnp.int32(group), first, end)


def _emit_load(addresses: list[ir.Value], transposed: bool) -> list[FragmentedArray]:
    """Emit the loads and conversions of a thread, from the addresses of its chunk for each step.

    `ldmatrix` loads four matrices of eight slots by one chunk. Of each, a thread receives four bytes of one slot, or,
    if it transposes them, two bytes of two adjacent slots.
    """
    layout = _LAYOUT.to_mgpu()
    operands = [np.empty(layout.registers_shape((ROWS, ROWS)), object) for _ in range(OPERANDS)]
    for step, address in enumerate(addresses):
        for matrix, loaded in enumerate(_emit_load_matrices(address, ".trans" if transposed else "")):
            column, row = divmod(matrix, 2)
            for operand, register in zip(operands, _emit_conversion(loaded, transposed), strict=True):
                operand[0, 2 * step + column, 0, 0, row] = register  # eight columns, eight of the warp's 16 rows
    return [FragmentedArray(_registers=x, _layout=layout, _is_signed=None) for x in operands]


def _emit_load_exact(memory: ir.Value, group: ir.Value) -> FragmentedArray:
    layout, pair = _LAYOUT.to_mgpu(), ir.VectorType.get((2,), ir.BF16Type.get())
    registers = np.empty(layout.registers_shape((ROWS, EXACT_NUMBERS)), object)
    for matrix, loaded in enumerate(_emit_load_matrices(_emit_address(memory, _const(0), group), "")):
        column, row = divmod(matrix, 2)
        registers[0, column, 0, 0, row] = llvm.bitcast(pair, loaded)
    return FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _emit_load_matrices(address: ir.Value, order: str) -> list[ir.Value]:
    """Emit the load of four matrices. Eight threads give the addresses of the chunks of a matrix."""
    text = f"ldmatrix.sync.aligned.m8n8.x4{order}.shared.b16 {{$0, $1, $2, $3}}, [$4];"
    return _emit_asm(text, 4, address, loads=True)


def _emit_addresses(memory: ir.Value, group: ir.Value, few_registers: bool) -> list[ir.Value]:
    """Emit the address of this thread's chunk for each step of 16 numbers of 16 bits."""
    if not few_registers:
        return [_emit_address(memory, group, _const(step)) for step in _STEPS]
    first = _emit_address(memory, group, _const(0))
    # A step changes bits 5 and 6 of the address, before and after the permutation.
    return [arith.xori(first, _const(2 * step * _CHUNK)) for step in _STEPS]


def _emit_address(memory: ir.Value, group: ir.Value, step: ir.Value) -> ir.Value:
    """Emit the address of this thread's chunk: 16 slots for each warp, and two chunks for each step."""
    warp, lane = _emit_thread()
    slot = _add(_multiply(warp, _WARP_ROWS), arith.remui(lane, _const(16)))
    return _emit_chunk(memory, group, slot, _add(arith.divui(lane, _const(16)), _multiply(step, 2)))


def _emit_transposed_addresses(memory: ir.Value, group: ir.Value, few_registers: bool) -> list[ir.Value]:
    """Emit the address of this thread's chunk for each step of 16 slots: two chunks for each warp."""
    warp, lane = _emit_thread()
    odd_matrix = arith.remui(arith.divui(lane, _const(8)), _const(2))
    slot = _add(_multiply(arith.divui(lane, _const(16)), 8), arith.remui(lane, _const(8)))
    chunk = _add(_multiply(warp, 2), odd_matrix)
    if not few_registers:
        return [_emit_chunk(memory, group, _add(slot, _const(16 * step)), chunk) for step in _STEPS]
    first = _emit_chunk(memory, group, slot, chunk)
    # 16 slots further the permutation is the same, because it depends on the place in the atom.
    return [_add(first, _const(2 * step * _atoms_size(memory))) for step in _STEPS]


def _emit_chunk(memory: ir.Value, group: ir.Value, slot: ir.Value, chunk: ir.Value) -> ir.Value:
    """Emit the address of 16 bytes of a slot, in the permutation of the matrix unit."""
    permuted = arith.xori(chunk, arith.remui(slot, _const(_ATOM_SLOTS)))
    return _add(_emit_slot(memory, group, slot), _multiply(permuted, _CHUNK))


def _emit_slot(memory: ir.Value, group: ir.Value, slot: ir.Value) -> ir.Value:
    """Emit the address of the 128 bytes of a group and slot. Atoms of the same slots are adjacent."""
    nth_atom, nth = arith.divui(slot, _const(_ATOM_SLOTS)), arith.remui(slot, _const(_ATOM_SLOTS))
    of_group = _multiply(group, _ATOM_SLOTS * _ATOM_BYTES)
    of_slots = _multiply(nth_atom, _atoms_size(memory))
    return _add(_emit_start(memory), of_group, of_slots, _multiply(nth, _ATOM_BYTES))


def _atoms_size(memory: ir.Value) -> int:
    """Return the bytes of eight slots of a tile: of an atom for each group."""
    return ir.MemRefType(memory.type).shape[1] * _ATOM_SLOTS * _ATOM_BYTES


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


def _emit_load_scales(memory: ir.Value, group: ir.Value) -> FragmentedArray:
    """Emit the loads of a thread, which has two rows."""
    layout, f32 = _PER_SLOT.to_mgpu(), ir.F32Type.get()
    groups = ir.MemRefType(memory.type).shape[1]
    registers = np.empty(layout.registers_shape((ROWS,)), object)
    for i, slot in enumerate(_emit_slots()):
        address = _add(_emit_start(memory), _multiply(slot, 4 * groups), _multiply(group, 4))
        [loaded] = _emit_asm("ld.shared.b32 $0, [$1];", 1, address, loads=True)
        registers.flat[i] = vector.from_elements(ir.VectorType.get((1,), f32), [arith.bitcast(f32, loaded)])
    return FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _emit_store_scales(memory: ir.Value, scales: FragmentedArray) -> None:
    for slot, register in zip(_emit_slots(), scales.registers.flat, strict=True):
        operands = [_add(_emit_start(memory), _multiply(slot, 4)), llvm.bitcast(_i32(), register)]
        llvm.inline_asm(None, operands, "st.shared.b32 [$0], $1;", "r,r", has_side_effects=True)


def _emit_slots() -> list[ir.Value]:
    """Emit the rows that a thread has of a product. Four threads share a row."""
    warp, lane = _emit_thread()
    first = _add(_multiply(warp, _WARP_ROWS), arith.divui(lane, _const(4)))
    return [first, _add(first, _const(8))]


def _emit_clear(memory: ir.Value, group: ir.Value, first: ir.Value, end: ir.Value) -> None:
    """Emit the stores of a thread, to half of a slot: zeros, unless first <= slot < end."""
    thread = arith.remui(thread_idx(), _const(_WARPGROUP))
    slot, half = arith.divui(thread, _const(2)), arith.remui(thread, _const(2))
    address = _add(_emit_slot(memory, group, slot), _multiply(half, _ATOM_BYTES // 2))
    places = range(0, _ATOM_BYTES // 2, _CHUNK)
    stores = "".join(f"@unseen st.shared.v4.b32 [$0 + {place}], {{0, 0, 0, 0}};" for place in places)
    text = f"""{{
        .reg .pred unseen;
        setp.lt.s32 unseen, $1, $2; setp.ge.or.s32 unseen, $1, $3, unseen;
        {stores}
    }}"""
    llvm.inline_asm(None, [address, slot, first, end], text, "r,r,r,r", has_side_effects=True)


def _emit_store_weights(
    memory: ir.Value, weights: list[FragmentedArray], factors_memory: ir.Value, factors: FragmentedArray
) -> None:
    for i, array in enumerate(weights):
        array.store_tiled(utils.memref_slice(memory, i), swizzle=128)
    factors.store_untiled(factors_memory, optimized=False)


def _emit_asm(text: str, results: int, operand: ir.Value, *, loads: bool = False) -> list[ir.Value]:
    """Emit PTX with one or several results and an operand, all of 32 bits."""
    constraints = ",".join(["=r"] * results + ["r"])
    type_ = llvm.StructType.get_literal([_i32()] * results) if results > 1 else _i32()
    value: Any = llvm.inline_asm(type_, [operand], text, constraints, has_side_effects=loads)
    return [llvm.extractvalue(_i32(), value, [i]) for i in range(results)] if results > 1 else [value]


def _emit_thread() -> tuple[ir.Value, ir.Value]:
    """Emit the index of this thread's warp in its warpgroup, and of the thread in the warp."""
    thread = arith.remui(thread_idx(), _const(_WARPGROUP))
    return arith.divui(thread, _const(_WARP)), arith.remui(thread, _const(_WARP))


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
