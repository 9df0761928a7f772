"""What a run leaves behind: numbers with intervals, their table, files, figures.

    result = StudyResult("toy", config, summarize(values, costs, baseline="fixed"), seconds)
    print(table(result))
    write(result, config.out)

Knows no study: a study imports this, never the other way round.
"""

from gradhpo.report.files import read, write, write_csv, write_each
from gradhpo.report.intervals import Summary, interval, paired
from gradhpo.report.provenance import command, versions
from gradhpo.report.results import METRICS, Difference, MethodResult, StudyResult, summarize
from gradhpo.report.run_directory import output_directory
from gradhpo.report.tables import table

__all__ = [
    "METRICS",
    "Difference",
    "MethodResult",
    "StudyResult",
    "Summary",
    "command",
    "interval",
    "output_directory",
    "paired",
    "read",
    "summarize",
    "table",
    "versions",
    "write",
    "write_csv",
    "write_each",
]
