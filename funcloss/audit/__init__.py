"""The audit: what each class's cost does to the updates, measured."""

from funcloss.audit.gram import Balance, balance
from funcloss.audit.measure import audit
from funcloss.audit.result import Audit, Check, ExampleRows, Impact, Method, Spread, StepAudit
from funcloss.audit.training import StepFindings, make_audit_step
from funcloss.audit.watch import Watch, watch
from funcloss.audit.words import compare, sentences

__all__ = [
    "Audit",
    "Balance",
    "Check",
    "ExampleRows",
    "Impact",
    "Method",
    "Spread",
    "StepAudit",
    "StepFindings",
    "Watch",
    "audit",
    "balance",
    "compare",
    "make_audit_step",
    "sentences",
    "watch",
]
