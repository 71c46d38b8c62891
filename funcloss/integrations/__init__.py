"""Callbacks that audit the trainings of other frameworks, each in a module of its own.

``funcloss.integrations.lightning`` and ``funcloss.integrations.transformers`` each have an
``AuditCallback``, and import their framework on use.
"""
