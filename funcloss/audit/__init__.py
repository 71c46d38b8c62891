"""The audit: what each class's cost does to the updates, measured."""

from funcloss.audit.gram import Balance, balance
from funcloss.audit.measure import audit
from funcloss.audit.page import About, render_page
from funcloss.audit.result import (
    Audit,
    Check,
    ExampleRows,
    Impact,
    Method,
    Spread,
    StepAudit,
)
from funcloss.audit.runs import RunAudit, audit_checkpoint, audit_run, write_report
from funcloss.audit.training import StepFindings, make_audit_step, observer
from funcloss.audit.watch import Watch, watch
from funcloss.audit.words import compare, sentences

__all__ = [
    "About",
    "Audit",
    "Balance",
    "Check",
    "ExampleRows",
    "Impact",
    "Method",
    "RunAudit",
    "Spread",
    "StepAudit",
    "StepFindings",
    "Watch",
    "audit",
    "audit_checkpoint",
    "audit_run",
    "balance",
    "compare",
    "make_audit_step",
    "observer",
    "render_page",
    "sentences",
    "watch",
    "write_report",
]
