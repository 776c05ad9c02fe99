"""The proof reads what the disassembler prints, and fails when it should."""

from __future__ import annotations

import re

import pytest

from tests.hardware.sass import __main__ as command
from tests.hardware.sass.expectations import ARCHITECTURES, EXPECTATIONS
from tests.hardware.sass.listing import Instruction, Kernel, assemble
from tests.hardware.sass.loops import loops
from tests.hardware.sass.occupancy import blocks, occupancy
from tests.hardware.sass.proof import bytes_in_flight, missing, prove

SYMBOL = (
    "_ZN7mas_ext4cuda12chunk_kernelINS0_20AccumulateImportanceEffEEvNS0_5TableIXsr9OperationIT0_EE"
    "8kStreamsEL_ZNS0_8in_codesEEEET_IS4_EPd"
)
SECTION = """
Fatbin ptx code:
================
arch = sm_120
compressed

Fatbin elf code:
================
arch = sm_90
code version = [1,8]
"""
# A loop of single elements, then one of vectors, two under way on two streams: as ptxas writes it,
# shortened. Behind the end lies the jump to itself that pads every kernel.
CODE = """
/*0000*/  S2R R0, SR_TID.X ;
/*0010*/  LDG.E R3, desc[UR4][R6.64] ;
/*0020*/  LDG.E R2, desc[UR4][R8.64] ;
/*0030*/  FFMA R3, |R2|, UR6, R3 ;
/*0040*/  STG.E desc[UR4][R6.64], R3 ;
/*0050*/  @!P0 BRA 0x10 ;
/*0060*/  BSSY B0, 0x120 ;
/*0070*/  @P0 BRA 0x110 ;
/*0080*/  @!P1 LDG.E.128 R4, desc[UR4][R38.64] ;
/*0090*/  @!P0 LDG.E.128 R8, desc[UR4][R38.64+0x1000] ;
/*00a0*/  @!P1 LDG.E.128 R12, desc[UR4][R40.64] ;
/*00b0*/  @!P0 LDG.E.128 R16, desc[UR4][R40.64+0x1000] ;
/*00c0*/  @P1 BRA 0xe0 ;
/*00d0*/  STG.E.128 desc[UR4][R38.64], R4 ;
/*00e0*/  FFMA R8, |R16|, UR6, R8 ;
/*00f0*/  STG.E.128 desc[UR4][R38.64+0x1000], R8 ;
/*0100*/  @!P2 BRA 0x80 ;
/*0110*/  BSYNC B0 ;
/*0120*/  EXIT ;
/*0130*/  BRA 0x130;
"""
USAGE = " Function {symbol}:\n  REG:30 STACK:0 SHARED:1088 LOCAL:0 CONSTANT[0]:29224\n"
BOUNDS = """
.nv.info.{symbol}
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x100 0x1 0x1
"""


def listings(code: str = CODE, usage: str = USAGE, symbol: str = SYMBOL) -> tuple[str, str, str]:
    """What cuobjdump prints for -sass, -res-usage and -elf."""
    lines = "".join(f"        {line}\n" for line in code.strip().splitlines())
    function = f"\t\tFunction : {symbol}\n{lines}"
    return (
        SECTION + function,
        SECTION + usage.format(symbol=symbol),
        SECTION + BOUNDS.format(symbol=symbol),
    )


def instructions(code: str) -> list[Instruction]:
    (kernel,) = assemble(*listings(code))
    return kernel.code


def test_a_kernel_is_read():
    (kernel,) = assemble(*listings())
    assert "chunk_kernel<mas_ext::cuda::AccumulateImportance, float, float>(" in kernel.name
    assert (kernel.architecture, kernel.threads) == (90, 256)
    assert (kernel.registers, kernel.stack, kernel.shared, kernel.local) == (30, 0, 1088, 0)
    assert len(kernel.code) == 20
    assert kernel.code[8] == Instruction(0x80, "!P1", "LDG.E.128", "R4, desc[UR4][R38.64]")


def test_a_good_kernel_has_nothing_wrong():
    (proof,), problems = prove(assemble(*listings()))
    assert problems == []
    assert command.line(proof).split(maxsplit=3) == [
        "sm_90", "AccumulateImportance", "float32",
        "30 registers  100%     64 B  reads 4 of 16; writes 2; 128 KiB in flight",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("LDG.E.128 R8", "LDG.E.64 R8", "accesses of less than 16 bytes: 1 LDG.E.64"),
        ("STG.E.128 desc[UR4][R38.64], R4", "NOP", "4 + 1 accesses of 16 bytes, no multiple of 2"),
        ("LDG.E.128 R12", "LDG.E.128 R12, desc[UR4][R2.64] ;\n/*00a8*/ LDG.E.128 R12", "5 + 2"),
        (".128", "", "no loop with 16-byte accesses"),
        ("@!P2 BRA 0x80", "NOP", "no loop with 16-byte accesses"),
        ("S2R R0, SR_TID.X", "STL [R1], R0", "0 loads from it, 1 stores"),
        ("S2R R0, SR_TID.X", "LDL.LU R0, [R1]", "1 loads from it, 0 stores"),
        ("STACK:0", "STACK:8", "8 bytes of stack"),
        ("LOCAL:0", "LOCAL:16", "16 bytes of local memory"),
        ("REG:30", "REG:255", "16384 bytes under way on a multiprocessor, 36364 keep the memory"),
        ("LDG.E.128 R4", "LD.E.128 R4", "does not know which memory it goes to: 1 LD.E.128"),
        ("S2R R0, SR_TID.X", "RED.E.ADD.F32 desc[UR4][R2.64], R0", "atomics"),
        ("FFMA R8, |R16|, UR6, R8", "DFMA R8, R16, R18, R8", "computes in float64"),
    ],
)
def test_what_breaks_a_kernel_is_reported(old, new, problem):
    assert old in CODE + USAGE
    found = prove(assemble(*listings(CODE.replace(old, new), USAGE.replace(old, new))))[1]
    assert [one for one in found if problem in one], found
    assert all(one.startswith("sm_90 AccumulateImportance float32: ") for one in found)


# Two vectors of θ, θ* and codes under way, each with the scales of its first and its last element.
CODES = """
/*0000*/  LDG.E.128 R4, desc[UR4][R38.64] ;
/*0010*/  LDG.E.128 R8, desc[UR4][R38.64+0x1000] ;
/*0020*/  LDG.E.128 R12, desc[UR4][R40.64] ;
/*0030*/  LDG.E.128 R16, desc[UR4][R40.64+0x1000] ;
/*0040*/  LDG.E R20, desc[UR4][R42.64] ;
/*0050*/  LDG.E R21, desc[UR4][R42.64+0x400] ;
/*0060*/  LDG.E R22, desc[UR4][R44.64] ;
/*0070*/  LDG.E R23, desc[UR4][R46.64] ;
/*0080*/  LDG.E R24, desc[UR4][R48.64] ;
/*0090*/  LDG.E R25, desc[UR4][R50.64] ;
/*00a0*/  I2FP.F32.U8 R20, R20 ;
/*00b0*/  @!P0 BRA 0x0 ;
/*00c0*/  EXIT ;
"""


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("", "", None),
        ("LDG.E R21", "LDG.E.U8 R21", "has accesses of less than 16 bytes: 1 LDG.E.U8"),
        ("LDG.E R25", "NOP ; // R25", "has 5 + 0 accesses of 4 bytes, no multiple of 3 + 0"),
        ("LDG.E.128 R16", "LDG.E R16", "has 3 + 0 accesses of 16 bytes, no multiple of 2 + 0"),
    ],
)
def test_codes_are_read_by_as_much_less_as_they_are_narrower(old, new, problem):
    symbol = SYMBOL.replace("20AccumulateImportanceEff", "13PenaltyEnergyEfh")
    (proof,), problems = prove(assemble(*listings(CODES.replace(old, new), symbol=symbol)))
    assert proof.expectation.title == "PenaltyEnergy float32, Ω uint8"
    if problem is None:
        assert problems == []
        assert command.hot_loop(proof).startswith("reads 6 of 4, 4 of 16; writes 0;")
        assert proof.in_flight == 4 * 16 + 6 * 4
    else:
        assert [one for one in problems if problem in one], problems


PRODUCT = """
/*0000*/  LDG.E.128 R4, desc[UR4][R38.64] ;
/*0010*/  STS.128 [R2], R4 ;
/*0020*/  @!P0 BRA 0x0 ;
/*0030*/  LDSM.16.MT88.4 R4, [R2] ;
/*0040*/  LDS.128 R8, [R3] ;
/*0050*/  HMMA.16816.F32.BF16 R12, R4, R8, R12 ;
/*0060*/  @!P0 BRA 0x30 ;
/*0070*/  EXIT ;
"""


@pytest.mark.parametrize(
    ("old", "new", "problems"),
    [
        ("", "", []),
        ("LDS.128", "LDS.64", ["the hot loop reads shared memory by 1 LDS.64"]),
        ("HMMA", "FFMA", ["no loop with HMMA"]),
        (
            "LDG.E.128",
            "LDG.E.64",
            ["no loop with 16-byte accesses brings the factors there"],
        ),
        (
            "LDSM.16.MT88.4",
            "LD.E",
            ["the hot loop does not know which memory it goes to: 1 LD.E"],
        ),
    ],
)
def test_a_product(old, new, problems):
    symbol = "_ZN7mas_ext4cuda12outer_kernelIN3c108BFloat16ENS_12MagnitudeAbsEEEvNS_5OuterE"
    kernels = assemble(*listings(PRODUCT.replace(old, new), symbol=symbol))
    where = "sm_90 outer bfloat16"
    assert prove(kernels)[1] == [f"{where}: {problem}" for problem in problems]


def test_a_product_whose_factors_are_brought_one_by_one():
    symbol = "_ZN7mas_ext4cuda15low_rank_kernelIfEEvNS_7LowRankE"
    code = PRODUCT.replace("HMMA.16816.F32.BF16 R12, R4, R8, R12", "FFMA R12, R4, R8, R12")
    assert prove(assemble(*listings(code.replace("LDG.E.128", "LDG.E"), symbol=symbol)))[1] == []


def test_loads_are_in_flight_until_one_is_used():
    code = """
    /*0000*/  LDG.E.128 R4, desc[UR4][R2.64] ;
    /*0010*/  LDG.E.ENL2.256 R8, R12, desc[UR4][R2.64] ;
    /*0020*/  FADD R20, R15, R21 ;
    /*0030*/  LDG.E.128 R16, desc[UR4][R2.64] ;
    """
    assert bytes_in_flight(instructions(code)) == 48
    assert bytes_in_flight(instructions(code.replace("R15", "R22"))) == 64


def test_a_loop_has_its_own_instructions_only():
    code = """
    /*0000*/  NOP ;
    /*0010*/  LDG.E R2, desc[UR4][R2.64] ;
    /*0020*/  LDG.E.64 R2, desc[UR4][R2.64] ;
    /*0030*/  BRA.U !UP0, 0x20 ;
    /*0040*/  CALL.REL.NOINC 0x80 ;
    /*0050*/  @P0 BRA 0x70 ;
    /*0060*/  BRA 0x10 ;
    /*0070*/  EXIT ;
    /*0080*/  FADD R3, R3, R3 ;
    /*0090*/  @P0 BRA 0x80 ;
    /*00a0*/  RET.REL.NODEC R4 0x0 ;
    """
    found = {loop.address: [i.address for i in loop.code] for loop in loops(instructions(code))}
    assert found == {
        0x10: [0x10, 0x40, 0x50, 0x60],
        0x20: [0x20, 0x30],
        0x80: [0x80, 0x90],
    }


def test_a_jump_that_cannot_be_followed_is_not_passed_over():
    with pytest.raises(ValueError, match="cannot follow"):
        loops(instructions("/*0000*/ BRX R4 -0x20 ;\n/*0010*/ EXIT ;"))


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "threads", "resident"),
    [
        (80, 32, 0, 256, 8),
        (80, 255, 0, 256, 1),
        (90, 16, 0, 32, 32),
        (90, 16, 100 * 1024 + 1024, 256, 2),
        (80, 16, 82 * 1024, 256, 1),
        (120, 40, 0, 256, 6),
    ],
)
def test_blocks_on_a_multiprocessor(architecture, registers, shared, threads, resident):
    kernel = Kernel(architecture, SYMBOL, registers, 0, shared, 0, threads, [])
    assert blocks(kernel) == resident
    warps = 48 if architecture == 120 else 64
    assert occupancy(kernel) == resident * threads / 32 / warps


def test_a_kernel_nobody_expects_and_kernels_that_are_missing():
    assert prove(assemble(*listings(symbol="_ZN7mas_ext4cuda5otherEv")))[1] == [
        "mas_ext::cuda::other(): not in expectations.py"
    ]
    proofs, _ = prove(assemble(*listings()))
    absent = missing(proofs)
    assert len(absent) == len(EXPECTATIONS) * len(ARCHITECTURES) - 1
    assert "sm_80 AccumulateImportance float32: not in there" in absent


@pytest.mark.parametrize(("absent", "status"), [([], 0), (["sm_80 …: not in there"], 1)])
def test_the_command_fails_where_something_is_wrong(monkeypatch, capsys, absent, status):
    monkeypatch.setattr("sys.argv", ["tests.hardware.sass", "some.so"])
    monkeypatch.setattr(command, "read", lambda library: assemble(*listings()))
    monkeypatch.setattr(command, "missing", lambda proofs: absent)
    assert command.main() == status
    out = capsys.readouterr().out
    assert "sm_90 AccumulateImportance float32" in out
    assert re.findall("^WRONG: (.*)", out, re.MULTILINE) == absent
