"""Missing barriers and waits are reported, and matrices lie where the instruction set's manual has them."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest

from tests.ptx import machine, memory
from tests.ptx.convert import to_bf16, wide
from tests.ptx.machine import launch
from tests.ptx.memory import Array
from tests.ptx.parse import Fault, Module

HEAD = """.extern .shared .align 16 .b8 smem[];
.visible .entry k(.param .u64 p0, .param .u64 p1) {
.reg .pred %p<9>; .reg .b32 %r<199>; .reg .b64 %w<9>;
mov.u32 %r0, %tid.x; ld.param.u64 %w0, [p0]; ld.param.u64 %w1, [p1];
mul.wide.u32 %w2, %r0, 16; add.s64 %w3, %w0, %w2; add.s64 %w4, %w1, %w2;
mov.u32 %r1, smem; shl.b32 %r2, %r0, 4; add.s32 %r3, %r1, %r2; xor.b32 %r4, %r2, 512; add.s32 %r5, %r1, %r4;
"""


def run(body: str, x: Array, y: Array, ctas: int = 1, threads: int = 128) -> None:
    """Of each CTA, %w3 and %w4 are its threads' 16 bytes of x and y, %r3 of shared memory, and %r5 another warp's."""
    ranges = [(a.ctypes.data, a.nbytes) for a in (x, y)]
    code = Module(f"{HEAD}{body}\nret;\n}}\n")["k"]
    launch(code, (ctas, 1, 1), threads, b"".join(at.to_bytes(8, "little") for at, _ in ranges), 1 << 15, ranges)


GET = "ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%w3];"
PUT = "st.shared.v4.b32 [%r3], {%r10, %r11, %r12, %r13};"
OTHER = "ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r5];"
COPY = "cp.async.cg.shared.global [%r3], [%w3], 16; cp.async.commit_group;"
OUT = "st.global.v4.b32 [%w4], {%r20, %r21, %r22, %r23};"
BAR, WAIT = "bar.sync 0;", "cp.async.wait_group 0;"
RIGHT = ((GET, PUT, BAR, OTHER, BAR, PUT, OUT), (COPY, WAIT, BAR, OTHER, OUT))
THROUGH = f"{GET} st.global.v4.b32 [%w4], {{%r10, %r11, %r12, %r13}};"  # global memory, read by another warp
ACROSS = "xor.b64 %w5, %w2, 512; add.s64 %w6, %w1, %w5; ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%w6];"
WRONG = {
    "a write after which another warp reads": ((GET, PUT, BAR, PUT, OTHER), "reads what warp"),
    "a read before which another warp writes": ((GET, PUT, BAR, OTHER, PUT), "writes what warp"),
    "a read that nothing wrote": ((OTHER,), "nothing wrote"),
    "a copy without a wait": ((COPY, BAR, OTHER), "nothing wrote"),
    "a copy without a barrier": ((COPY, WAIT, OTHER), "reads what warp"),
    "a copy over what is read": ((GET, PUT, BAR, OTHER, COPY), "writes what warp"),
    "a place for two numbers": ((GET, "st.shared.b32 [%r1], %r10;"), "different values"),
    "a global place for two numbers": ((GET, "st.global.b32 [%w1], %r10;"), "different values"),
    "global memory": ((THROUGH, ACROSS), "global address"),
}


def test_what_is_ordered_passes():
    x = np.arange(512, dtype=np.uint32)
    for parts in (*RIGHT, (THROUGH, BAR, ACROSS, OUT.replace("%w4", "%w3"))):
        y = np.zeros_like(x)
        run(" ".join(parts), x.copy(), y)
        assert y.any()
    run(" ".join(RIGHT[0]), x, y)
    assert (y == x.reshape(4, 128)[[1, 0, 3, 2]].ravel()).all()


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_ordered_is_told(name):
    parts, what = WRONG[name]
    x = np.arange(512, dtype=np.uint32)
    with pytest.raises(Fault, match=what):
        run(" ".join(parts), x, np.zeros_like(x))


def test_no_barrier_orders_two_ctas(monkeypatch):
    """One writes before it and one reads or writes after it, side by side or, as the 41st of 128 threads, later."""
    x = np.arange(512, dtype=np.uint32)
    first, last = (
        "st.global.v4.b32 [%w4], {%r10, %r11, %r12, %r13};",
        "ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%w4];",
    )
    for many in (memory.MANY, 0):
        monkeypatch.setattr(memory, "MANY", many)
        for one, two in ((first, last), (last, first), (first, first), (last, last)):
            for a, b in ((0, 1), (0, 40), (0, 0), (40, 3)):
                guards = f"mov.u32 %r7, %ctaid.x; setp.eq.u32 %p1, %r7, {a}; setp.eq.u32 %p2, %r7, {b};"
                body = f"{guards} {GET} @%p1 {one} {BAR} {BAR} @%p2 {two} {BAR}"
                if a == b or one == two == last:
                    run(body, x, x.copy(), ctas=41)
                else:
                    with pytest.raises(Fault, match="hazard: CTAs of k: "):
                        run(body, x, x.copy(), ctas=41)


TURN = """mov.u32 %r30, %ctaid.x; setp.eq.u32 %p0, %r0, 0; mul.wide.u32 %w5, %r30, 4; add.s64 %w6, %w1, %w5;
@%p0 st.global.b32 [%w6], %r30; FENCE @%p0 atom.global.inc.u32 %r31, [%w0], 2; bar.sync 0;
@!%p0 bra $END; setp.ne.u32 %p1, %r31, TURN; @%p1 bra $END;
ld.global.b32 %r32, [%w1+4]; ld.global.b32 %r33, [%w1+8]; add.s32 %r34, %r32, %r33; st.global.b32 [%w1+12], %r34;
$END:
"""


@pytest.mark.parametrize(
    ("fence", "turn", "ordered"), [("membar.gl;", 2, True), ("", 2, False), ("membar.gl;", 1, False)]
)
def test_the_last_turn_at_an_atomic_is_after_all_others(fence, turn, ordered, monkeypatch):
    """Of three CTAs, side by side and one after the other; not without a fence, and no other turn."""
    for at_once in (machine.AT_ONCE, 32):
        monkeypatch.setattr(machine, "AT_ONCE", at_once)
        x, y = np.zeros(512, np.uint32), np.zeros(512, np.uint32)
        body = TURN.replace("FENCE", fence).replace("TURN", str(turn))
        with nullcontext() if ordered else pytest.raises(Fault, match="hazard: CTAs of k"):
            run(body, x, y, ctas=3, threads=32)
            assert y[:4].tolist() == [0, 1, 2, 3]
            assert x[0] == 0


def test_a_register_that_not_every_thread_wrote_is_told():
    """Each reads what it wrote itself; which others did, and whether by a branch or a predicate, is nothing to it."""
    x = np.arange(512, dtype=np.uint32)
    some, others = "@%p1 mov.b32 %r20, 1;", "@!%p1 mov.b32 %r20, 2;"
    branch = "@%p1 bra $L; mov.b32 %r20, 1; bra $M; $L: mov.b32 %r21, 2; $M:"
    both, out = f"{some} {others}", "st.global.b32 [%w4], %r20;"
    read, guarded = (f"{by} add.u32 %r22, %r20, 1; {by} st.global.b32 [%w4], %r22;" for by in ("", "@%p1"))
    sum_of_40 = "setp.lt.u32 %p2, %r0, 40; shfl.sync.bfly.b32 %r23, %r20, BY, 31, -1; add.u32 %r24, %r20, %r23;"
    sum_of_40 += " @%p2 st.global.b32 [%w4], %r24;"  # of lanes below 8 of the second warp
    sums = f"{GET} {PUT} {BAR} setp.eq.u32 %p3, %r6, 0; @%p3 mov.b32 %r30, 0; @%p3 mov.b32 %r31, 0;"
    sums = f"mov.u32 %r6, %ctaid.x; {sums} @%p3 mov.b32 %r32, 0; @%p3 mov.b32 %r33, 0; mov.b64 %w5, 0;"
    wgmma = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r30, %r31, %r32, %r33}, %w5, %w5, <add>, 1, 1, 0, 0;"
    for body, told in (
        (f"{some} {read}", True),
        (f"{some} {guarded.replace('@', '@!')}", True),
        (f"{some} {out}", True),
        (f"{branch} {read}", True),
        (f"{some} {guarded}", False),
        (f"{some} {sum_of_40.replace('BY', '4')}", False),
        (f"{some} {sum_of_40.replace('BY', '8')}", True),
        (f"mov.b32 %r24, 3; {some} {sum_of_40.replace('BY', '8')}", True),
        (f"{some} setp.eq.u32 %p2, %r20, 1; @%p2 mov.b32 %r22, 1;", True),
        (f"{both} {read}", False),
        (f"{branch} {guarded.replace('@', '@!')}", False),
        (f"mov.b32 %r20, 3; {some} {read}", False),
        (f"{some} mov.b32 %r20, 3; {read}", False),
        ("@%p1 setp.eq.u32 %p2, %r0, 0; @%p2 mov.b32 %r20, 1;", True),
        ("@%p1 setp.eq.u32 %p2, %r0, 0; @!%p1 bra $L; @%p2 mov.b32 %r20, 1; $L:", False),
        (f"{sums} {wgmma.replace('<add>', '1')}", True),
        (f"{sums} {wgmma.replace('<add>', '%p3')}", False),  # no sum is read where nothing is added to it
    ):
        with pytest.raises(Fault, match="not each of the threads wrote") if told else nullcontext():
            run(f"setp.lt.u32 %p1, %r0, 40; {body}", x, x.copy(), ctas=1 + ("ctaid" in body))


SUMS = "{%r20, %r21, %r22, %r23}"
ACCESSES = (
    f"ld.shared.v4.b32 {SUMS}, [%r6];",
    f"st.shared.v4.b32 [%r6], {SUMS};",
    "cp.async.cg.shared.global [%r6], [%w3], 16;",
    f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {SUMS}, [%r6];",
    f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r6], {SUMS};",
    f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {SUMS}, %w5, %w5, 0, 1, 1, 0, 0;",
)


def test_another_ctas_shared_memory_is_told():
    """It lies beside one's own in the interpreter: what is past the end, or before the start, is nobody's."""
    x = np.arange(512, dtype=np.uint32)
    zeros = " ".join(f"mov.b32 %r{n}, 0;" for n in range(20, 24))
    fill = f"{zeros} {GET} {PUT} st.shared.v4.b32 [%r3+30720], {{%r10, %r11, %r12, %r13}}; {BAR}"
    for access in ACCESSES:
        for cta, offset in ((0, 32768), (1, -2048)):
            at = f"add.s32 %r6, %r3, {offset}; mov.b64 %w5, {offset >> 4 & 0x3FFF};"
            body = f"{fill} {at} mov.u32 %r7, %ctaid.x; setp.eq.u32 %p1, %r7, {cta}; @%p1 {access}"
            with pytest.raises(Fault, match="shared address"):
                run(body, x, x.copy(), ctas=2)


# ---- matrices ---------------------------------------------------------------------------------------------------


def bf16(*shape: int, seed: int = 0) -> tuple[Array, Array]:
    """Bits, and their values."""
    bits = to_bf16(np.random.default_rng(seed).normal(size=shape).astype(np.float32))
    return bits, wide(bits, "bf16").astype(np.float64)


def test_mma_has_its_elements_where_the_manual_says():
    """m16n8k16, lane by lane; the matrices come by ldmatrix, transposed for B, and C is one."""
    (a, left), (b, right) = bf16(16, 16, seed=1), bf16(16, 8, seed=2)
    shared = np.zeros(1024, np.uint16)
    shared[:256], shared[256:384] = a.ravel(), b.ravel()
    out = np.zeros(512, np.float32)
    body = f"""{GET} {PUT} {BAR} and.b32 %r6, %r0, 15; and.b32 %r7, %r0, 16;
    shl.b32 %r8, %r6, 5; add.s32 %r8, %r8, %r7; add.s32 %r8, %r8, %r1;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r30, %r31, %r32, %r33}}, [%r8];
    shl.b32 %r9, %r6, 4; add.s32 %r9, %r9, %r1;
    ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {{%r34, %r35}}, [%r9+512];
    mov.b32 %r40, 0f3F800000;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%r20, %r21, %r22, %r23}}, {{%r30, %r31, %r32, %r33}},
     {{%r34, %r35}}, {{%r40, %r40, %r40, %r40}}; {OUT}"""
    run(body, shared, out)
    wanted = left @ right + 1
    for lane in range(32):
        for i in range(4):
            row, column = lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2
            assert out[4 * lane + i] == np.float32(wanted[row, column])


@pytest.mark.parametrize("width", [128, 64, 32])
@pytest.mark.parametrize("turned", [False, True])
def test_wgmma_reads_swizzled_shared_memory(width, turned):
    """m64n16k16: a row of `width` bytes after the other, and 16 bytes of it exchanged by the row's number.

    Turned, B lies as (k, n): where n fills no row of `width` bytes, the rest is padding.
    """
    (a, left), (b, right) = bf16(64, 16, seed=3), bf16(16, 16, seed=4)
    mode, mask = {128: (1, 7), 64: (2, 3), 32: (3, 1)}[width]
    shared = np.zeros(1 << 14, np.uint8)

    def place(matrix: Array, at: int) -> None:
        for (r, c), word in np.ndenumerate(matrix):
            to = at + r * width + 2 * c
            to ^= (to >> 7 & mask) << 4
            shared[to : to + 2] = np.frombuffer(word.tobytes(), np.uint8)

    place(a, 0)
    place(b.T.copy() if turned else b, 8192)
    out = np.zeros(128 * 8, np.float32)
    stride = 8 * width >> 4
    descriptor = [mode << 62 | stride << 32 | stride << 16 | at >> 4 for at in (0, 8192)]
    fill = "".join(
        f"ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%w3+{n}]; "
        f"st.shared.v4.b32 [%r3+{n}], {{%r10, %r11, %r12, %r13}};\n"
        for n in range(0, 1 << 14, 2048)
    )
    sums = ", ".join(f"%r{n}" for n in range(30, 38))
    body = f"""{fill} fence.proxy.async.shared::cta; <bar> wgmma.fence.sync.aligned;
    mov.b64 %w5, {descriptor[0]}; mov.b64 %w6, {descriptor[1]};
    wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {{{sums}}}, %w5, %w6, 0, 1, 1, 0, {int(turned)};
    wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {{{sums}}}, %w5, %w6, 1, 1, 1, 0, {int(turned)};
    wgmma.commit_group.sync.aligned; <wait> shl.b32 %r6, %r0, 5; cvt.u64.u32 %w7, %r6; add.s64 %w8, %w1, %w7;
    st.global.v4.b32 [%w8], {{%r30, %r31, %r32, %r33}}; st.global.v4.b32 [%w8+16], {{%r34, %r35, %r36, %r37}};
    bar.sync 0; st.shared.b32 [%r3], %r0;"""
    wait = "wgmma.wait_group.sync.aligned 0;"
    run(body.replace("<bar>", BAR).replace("<wait>", wait), shared, out)
    wanted = 2 * (left @ right.T)
    for thread in range(128):
        for i in range(8):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
            column = 8 * (i // 4) + 2 * (thread % 4) + i % 2
            assert abs(out[8 * thread + i] - wanted[row, column]) <= 2e-6 * abs(wanted).max()
    with pytest.raises(Fault, match="still reads"):
        run(body.replace("<bar>", BAR).replace("<wait>", ""), shared, out)
    with pytest.raises(Fault, match="reads what"):
        run(body.replace("<bar>", "").replace("<wait>", wait), shared, out)
