"""What a warp waits for, read from small listings written by hand."""

import pytest
from audit.compilation import Compilation, idle
from audit.machine_code import layout, parse
from audit.waits import Waits, trips, waits


def listing(text: str) -> list:
    """Instructions of lines such as "@P0 BRA 3", where a number is that of a line."""
    lines = []
    for number, line in enumerate(filter(None, map(str.strip, text.splitlines()))):
        *_, rest = line.rpartition("@P0 ")
        name, _, operands = rest.partition(" ")
        if name == "BRA":
            operands = hex(16 * int(operands))
        guard = "@P0 " * (rest != line)
        lines.append(f"/*{16 * number:04x}*/  {guard}{name} {operands} ;")
    return parse("\n".join(lines))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("LDG.E R4, desc[UR4][R2.64] \n IADD3 R5, R4, R6, RZ", 1),
        ("LDG.E R4, desc[UR4][R2.64] \n IADD3 R5, R7, R6, RZ", 0),
        # Two that are under way together are one trip, one whose address the other brings is two.
        ("LDG.E R4, desc[UR4][R2.64] \n LDG.E R5, desc[UR4][R8.64] \n IADD3 R6, R4, R5, RZ", 1),
        ("LDG.E R4, desc[UR4][R2.64] \n LDG.E R8, desc[UR4][R4.64] \n IADD3 R6, R8, R5, RZ", 2),
        # What is loaded behind a wait has not been under way in it.
        (
            "LDG.E R4, desc[UR4][R2.64] \n FADD R0, R4, R4 \n LDG.E R5, desc[UR4][R8.64] \n"
            "FADD R0, R5, R0",
            2,
        ),
        ("LDG.E.128 R4, desc[UR4][R2.64] \n FADD R0, R7, R0", 1),
        ("LDG.E.64 R4, desc[UR4][R2.64] \n FADD R0, R6, R0", 0),
        ("LDG.E R4, desc[UR4][R2.64] \n STS.128 [R9], R4", 1),
        ("LDG.E R6, desc[UR4][R2.64] \n STS.128 [R9], R4", 1),
        ("UTMALDG.2D [UR4], [UR6] \n SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR10], R1", 1),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR10], R1 \n UTMALDG.2D [UR4], [UR6]", 0),
        (
            "LDG.E R4, desc[UR4][R2.64] \n UTMALDG.2D [UR4], [UR6] \n"
            "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR10], R1 \n FADD R0, R4, R0",
            1,
        ),
        ("LDGSTS.E.128 [R2], desc[UR4][R4.64] \n LDGDEPBAR \n DEPBAR.LE SB0, 0x0", 1),
        ("LDGSTS.E.128 [R2], desc[UR4][R4.64] \n LDGDEPBAR \n DEPBAR.LE SB0, 0x1", 0),
        ("UTMASTG.2D [UR4], [UR6] \n UTMACMDFLUSH \n DEPBAR.LE SB0, 0x0", 0),
    ],
)  # fmt: skip
def test_trips_are_counted_in_the_order_of_issue(text, expected):
    assert trips(listing(text)) == expected


# Two passes ahead by TMA; a load before the loop, two that follow one another behind it.
PIPELINED = """
LDG.E R4, desc[UR4][R2.64]
FADD R5, R4, R4
UTMALDG.2D [UR4], [UR6]
UTMALDG.2D [UR4], [UR6]
UTMALDG.2D [UR4], [UR6]
UTMALDG.2D [UR4], [UR6]
SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR10], R1
@P0 BRA 20
HGMMA.64x64x16.F32.BF16 R24, gdesc[UR56], R24, gsb0
WARPGROUP.DEPBAR.LE gsb0, 0x1
UTMALDG.2D [UR4], [UR6]
UTMALDG.2D [UR4], [UR6]
@P0 BRA 6
LDG.E R4, desc[UR4][R2.64]
LDG.E R6, desc[UR4][R4.64]
FADD R0, R6, R0
STG.E desc[UR4][R2.64], R0
EXIT
NOP
NOP
SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR10], R1
@P0 BRA 20
BRA 8
"""
# The same by asynchronous copies, one pass ahead, in front of it a path that leaves it out.
COPIES = """
@P0 BRA 5
LDG.E R4, desc[UR4][R2.64]
FADD R5, R4, R4
STG.E desc[UR4][R2.64], R5
EXIT
LDGSTS.E.128 [R2], desc[UR4][R4.64]
LDGDEPBAR
LDGSTS.E.128 [R2], desc[UR4][R4.64]
LDGDEPBAR
DEPBAR.LE SB0, 0x1
HMMA.16816.F32.BF16 R8, R12, R14, R8
LDGSTS.E.128 [R2], desc[UR4][R4.64]
LDGDEPBAR
@P0 BRA 9
STG.E desc[UR4][R2.64], R8
EXIT
"""


def test_a_pipeline_of_descriptors():
    assert waits(listing(PIPELINED)) == Waits(1, 0, 2, under_way=1, products=1)


def test_a_pipeline_of_copies():
    assert waits(listing(COPIES)) == Waits(0, 0, 0, under_way=1, products=None)


def test_a_pass_that_waits_for_its_own_loads():
    serial = PIPELINED.replace("UTMALDG.2D [UR4], [UR6]\n" * 4, "NOP\n" * 4)
    late = "UTMALDG.2D [UR4], [UR6]\nUTMALDG.2D [UR4], [UR6]\n"
    first = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR10], R1\n@P0 BRA 20\n"
    serial = serial.replace(late, "NOP\nNOP\n").replace(first, late + first, 1)
    serial = serial.replace("BRA 20", "BRA 22").replace("BRA 8", "BRA 10")
    assert waits(listing(serial)) == Waits(1, 1, 2, under_way=0, products=1)


def test_a_kernel_without_a_loop_waits_in_one_part():
    text = "LDG.E R4, desc[UR4][R2.64] \n FADD R0, R4, R4 \n STG.E desc[UR4][R2.64], R0 \n EXIT"
    assert waits(listing(text)) == Waits(0, 0, 1, None, None)


SOUND = Waits(0, 0, 4, under_way=2, products=1)


@pytest.mark.parametrize(
    ("kernel", "stages", "found", "named"),
    [
        ("_linear_kernel", 4, SOUND, ""),
        ("_linear_kernel", 4, Waits(0, 0, 4, 0, 1), "with 4 stages, a pass waits for the newest"),
        ("_linear_kernel", 2, Waits(0, 0, 4, 0, 1), ""),
        ("_linear_kernel", 3, Waits(0, 2, 4, 1, 1), "waits 2 times for loads of its own"),
        ("_linear_kernel", 3, Waits(0, 0, 4, 1, 0), "waits for its own products"),
        ("_attention_kernel", 3, Waits(1, 0, 0, 1, 0), ""),
        ("_attention_kernel", 3, Waits(1, 0, 0, 0, 0), "waits for the newest loads"),
        ("_norm_kernel", 1, Waits(0, 0, 3, None, None), ""),
        ("_attention_kernel", 1, Waits(1, 2, 0, 0, 0), ""),
    ],
)
def test_a_pipeline_that_stands_still_is_a_fault(kernel, stages, found, named):
    item = Compilation(90, ("kernels", kernel), (), (), (), (("num_stages", stages),))
    assert len(idle(item, found)) == bool(named)
    assert named in "".join(idle(item, found))


def test_where_a_wait_is_tried_again_is_no_loop():
    text = "UTMALDG.2D [UR4], [UR6]\n" * 2 + "NOP\n" * 10
    text += """
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR10], R1
    @P0 BRA 19
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR56], R24, gsb0
    UTMALDG.2D [UR4], [UR6]
    @P0 BRA 2
    STG.E desc[UR4][R2.64], R0
    EXIT
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR10], R1
    @P0 BRA 19
    BRA 14
    """
    found = layout(listing(text)).loop
    assert (found[0].address, found[-1].address) == (2 * 16, 16 * 16)


def test_the_deepest_wait_of_a_pass_counts():
    twice = COPIES.replace("DEPBAR.LE SB0, 0x1\n", "DEPBAR.LE SB0, 0x1\nDEPBAR.LE SB0, 0x0\n")
    assert waits(listing(twice)).under_way == 0
