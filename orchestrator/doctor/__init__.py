"""``isotrain doctor``: whether a run would start here, said before one does.

Every ``check_...`` is a function from plain values to a :class:`orchestrator.doctor.finding.Finding`; what it is given
was looked up by a ``seen_...`` beside it. The table is a view of the findings.
"""
