"""The audit: what each class's cost does to the updates, measured."""

from funcloss.audit.gram import Balance, balance
from funcloss.audit.measure import audit
from funcloss.audit.result import (
    Audit,
    Check,
    ExampleRows,
    Impact,
    Method,
    Spread,
    StepAudit,
)

__all__ = [
    "Audit",
    "Balance",
    "Check",
    "ExampleRows",
    "Impact",
    "Method",
    "Spread",
    "StepAudit",
    "audit",
    "balance",
]
