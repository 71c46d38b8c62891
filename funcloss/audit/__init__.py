"""The audit: each class's share of the gradient and of the optimiser's step, measured."""

from funcloss.audit.behind import make_behind
from funcloss.audit.gram import Balance, balance
from funcloss.audit.layer_kinds import LAYERS
from funcloss.audit.ledger import Ledger, LedgerKeeper, make_ledger
from funcloss.audit.ledger_words import ledger_sentences
from funcloss.audit.loss import LossSpec
from funcloss.audit.measure import AuditSettings, audit
from funcloss.audit.result import (
    Audit,
    Check,
    ExampleRows,
    Impact,
    Method,
    StandardErrors,
    StepAudit,
)
from funcloss.audit.sampled import SampledKeeper, make_sampled_ledger
from funcloss.audit.step import StepSpec
from funcloss.audit.training import StepFindings, make_audit_step
from funcloss.audit.watch import Watch, watch
from funcloss.audit.watch_ledger import LedgerOptions
from funcloss.audit.words import compare, sentences

__all__ = [
    "LAYERS",
    "Audit",
    "AuditSettings",
    "Balance",
    "Check",
    "ExampleRows",
    "Impact",
    "Ledger",
    "LedgerKeeper",
    "LedgerOptions",
    "LossSpec",
    "Method",
    "SampledKeeper",
    "StandardErrors",
    "StepAudit",
    "StepFindings",
    "StepSpec",
    "Watch",
    "audit",
    "balance",
    "compare",
    "ledger_sentences",
    "make_audit_step",
    "make_behind",
    "make_ledger",
    "make_sampled_ledger",
    "sentences",
    "watch",
]
