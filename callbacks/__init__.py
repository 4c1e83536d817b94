"""Callbacks that observe a run. Deleting all of them changes no learned weight."""

from callbacks.checkpoints import LastCheckpoint, TimedCheckpoint
from callbacks.evaluations import EvaluateEvery, EvaluateFirst
from callbacks.exports import AdapterExport, ModelExport
from callbacks.first_step import FirstStep
from callbacks.predictions.writer import PredictionWriter
from callbacks.run_progress import RunProgress
from callbacks.run_summary import CheckSummary, DataSummary, HyperParameters
from callbacks.sample_generation import SampleGeneration
from callbacks.throughput import Throughput

__all__ = [
    "AdapterExport",
    "CheckSummary",
    "DataSummary",
    "EvaluateEvery",
    "EvaluateFirst",
    "FirstStep",
    "HyperParameters",
    "LastCheckpoint",
    "ModelExport",
    "PredictionWriter",
    "RunProgress",
    "SampleGeneration",
    "Throughput",
    "TimedCheckpoint",
]
