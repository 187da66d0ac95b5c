"""The adapters: against formulas written from the upstream text, and against the packages themselves."""
