"""What is wrong with a program, with evidence and remedy."""
from .diagnose import apply, diagnose
from .findings import EXAMINATIONS, Curves, Diagnosis, Finding, Patient, Remedy, examination
from .spectrum import Spectrum, spectrum
