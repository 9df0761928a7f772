"""`gradhpo doctor`: what is wrong with a task, and which method suits it.

    print(doctor(task, steps=20))

Faults are found by name, each by an experiment of its own (`gradhpo.doctor.experiments`); methods
are measured against the exact hypergradient of the task itself.
"""

from gradhpo.doctor.examine import Diagnosis, doctor
from gradhpo.doctor.faults import Fault

__all__ = ["Diagnosis", "Fault", "doctor"]
