"""Observers of a run: deleting every one of them must not change one learned weight."""

from callbacks.adapter_export import AdapterExport
from callbacks.data_summary import DataSummary
from callbacks.evaluate_first import EvaluateFirst
from callbacks.first_step import FirstStep
from callbacks.hyper_parameters import HyperParameters
from callbacks.model_export import ModelExport
from callbacks.prediction_writer import PredictionWriter
from callbacks.run_progress import RunProgress
from callbacks.sample_generation import SampleGeneration
from callbacks.throughput import Throughput
from callbacks.timed_checkpoint import TimedCheckpoint

__all__ = [
    "AdapterExport",
    "DataSummary",
    "EvaluateFirst",
    "FirstStep",
    "HyperParameters",
    "ModelExport",
    "PredictionWriter",
    "RunProgress",
    "SampleGeneration",
    "Throughput",
    "TimedCheckpoint",
]
