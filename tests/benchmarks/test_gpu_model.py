"""The reader of machine code and the model of the GPU half, on listings small enough to count by hand."""

import csv
from dataclasses import fields, replace

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import arithmetic, cases, model
from benchmarks.gpu.compare import PREDICTIONS
from benchmarks.gpu.sass import parse

LISTING = """
	.section	.text.copy_kernel,"ax",@progbits
.text.copy_kernel:
        /*0000*/                   S2R R19, SR_CTAID.X ;
        /*0010*/                   LDG.E R2, desc[UR4][R18.64] ;
.L_x_1:
        /*0020*/                   DEPBAR.LE SB0, 0x0 ;
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/                   STG.E.128 desc[UR4][R20.64], R4 ;
        /*0070*/              @!P0 STG.E.64 desc[UR4][R20.64+0x10], R10 ;
.L_x_2:
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/              @!P0 BRA `(.L_x_2) ;
        /*00a0*/               @P1 BRA `(.L_x_1) ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   BRA `(.L_x_3);
"""


def test_machine_code_is_read():
    sass = parse(LISTING)
    assert len(sass.code) == 13 and sass.count("EXIT") == 1
    assert [(loop.first, loop.last, loop.depth) for loop in sass.loops] == [(2, 10, 1), (8, 9, 2)]
    assert sass.widths("LDG") == {32: 1, 128: 2} and sass.widths("STG") == {64: 1, 128: 1}
    assert sass.loads_in_flight == 2  # the store of R4..R7 comes after both loads
    assert sass.waits_for_all_at_a_loop_top
    assert sass.barriers_in_loops == 1  # of the innermost
    later = LISTING.replace("DEPBAR.LE SB0, 0x0", "DEPBAR.LE SB0, 0x2")
    assert not parse(later).waits_for_all_at_a_loop_top


def test_a_load_that_is_used_at_once_is_alone_in_flight():
    between = LISTING.replace("/*0040*/", "/*0038*/ IADD3 R5, R4, R4, RZ ;\n /*0040*/")
    assert parse(between).loads_in_flight == 1


def test_one_kernel_is_named_where_there_are_several():
    both = LISTING + LISTING.replace("copy_kernel", "other_kernel")
    assert len(parse(both, "other").code) == 13
    with pytest.raises(ValueError, match="one kernel named '' is expected in a cubin, there are 2"):
        parse(both)


def kernel(**changes):
    return replace(model.Kernel("copy", parse(LISTING), 32, 0, 4, 1320), **changes)


def test_occupancy_and_waves():
    assert kernel().resident == 16  # 2,048 threads
    assert kernel(registers=128).resident == 4
    assert kernel(registers=129).resident == 3  # a warp gets registers in units of 256
    assert kernel(shared=100 * 1024).resident == 2
    assert kernel(registers=128).waves == 1320 / (132 * 4)


def test_loops_run_until_everything_is_loaded():
    copy, work = kernel(), arithmetic.Work(2**20, 2**20, loaded=10 * 2 * 16 * 128, flops=0, outputs=1)
    outer = copy.sass.loops[0]
    assert model.trips(copy.sass, outer, work.loaded, 128) == 10.0  # short, and so taken for a search
    long = replace(copy, sass=parse(LISTING.replace("/*0050*/", "/*0050*/ NOP ;\n" * 20 + "/*0050*/")))
    assert model.trips(long.sass, long.sass.loops[0], 4 * 2 * 16 * 128, 128) == 4.0
    assert model.executed(copy, work) == 4 + 10 * 9


def test_a_prediction_is_the_largest_bound_and_never_below_the_floor():
    heavy = arithmetic.Work(read=3 * 10**9, written=0, loaded=16, flops=0, outputs=1)
    seconds, floor, bound, _ = model.predict(kernel(), heavy)
    assert bound == "memory" and floor == pytest.approx(1e-3) and seconds == pytest.approx(1e-3, rel=0.01)
    products = replace(heavy, read=0, flops=60 * 10**12)
    assert model.predict(kernel(), products)[2] == "products"
    serial = replace(heavy, read=0, loaded=2**20)
    assert model.predict(kernel(programs=1), serial)[2] == "latency"


def test_the_committed_predictions_are_of_the_targets():
    with PREDICTIONS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [field.name for field in fields(model.Prediction)]
    totals = [row for row in rows if row["kernel"] == "total"]
    assert {row["shape"] for row in totals} == set(cases.TARGETS)
    keys = {(row["op"], row["provider"], row["mode"], row["shape"]) for row in totals}
    assert len(keys) == len(totals) == len(model.CALLS) + 1  # and patchify_frames
    for row in totals:
        assert float(row["predicted_us"]) >= float(row["floor_us"]) > 0
