"""Lava's own models of LIFReset and GradedVec with a tape beside them; they compute as they did."""

from __future__ import annotations

from lava.proc.graded.models import PyGradedVecModelFixed
from lava.proc.lif.models import PyLifResetModelBitAcc

from ranvier.deploy.lava_processes.tape import Recording


class TapedLifReset(Recording, PyLifResetModelBitAcc):
    """LIFReset, recorded."""


class TapedGradedVec(Recording, PyGradedVecModelFixed):
    """GradedVec, recorded; it has no state that lasts."""
