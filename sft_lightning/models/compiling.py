"""Compile a model layer by layer: layers are alike, so one compilation serves all, in seconds instead of minutes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sft_lightning.batch import DocumentLengths
from sft_lightning.compat.dynamo import (
    compile_backward_with_forward,
    compile_error,
    num_compiled_graphs,
    vary_size,
    watch_compilations,
)
from sft_lightning.compat.torch import change_class
from sft_lightning.errors import UserError
from sft_lightning.models.checkpointing import Recomputation, recomputable_layers, selective_contexts


class CompilationLog:
    """Reports what torch compiles while a model trains, and whether it compiles anything at all.

    Args:
        num_layers: Decoder layers that are to be compiled.
        log: Called with each line.
    """

    def __init__(self, num_layers: int, log: Callable[[str], None]) -> None:
        self._num_layers = num_layers
        self._log = log
        self._before = num_compiled_graphs()
        self._passes = 0
        self._compilations = 0
        self._seconds = 0.0
        self.failed = False
        """Whether a compilation has failed, so that all layers run without one from then on."""

        watch_compilations(self._note)

    def _note(self, seconds: float) -> None:
        self._compilations += 1
        self._seconds += seconds

    def begin_pass(self) -> None:
        """Report the compilations since the last micro-batch began; called when one begins."""
        if self._passes == 1:
            self._report_first()
        elif self._compilations and not self.failed:
            self._log(
                f"torch_compile: {self._compilations} recompilations in micro-batch {self._passes}, "
                f"{self._seconds:.1f} s; TORCH_LOGS=recompiles says why"
            )
        self._passes += 1
        self._compilations, self._seconds = 0, 0.0

    def _report_first(self) -> None:
        graphs = num_compiled_graphs() - self._before
        if graphs and not self.failed:
            self._log(f"torch_compile: graphs of {self._num_layers} decoder layers: {graphs} ({self._seconds:.1f} s)")
        elif not self.failed:
            self._log("torch_compile: nothing was compiled; TORCH_LOGS=graph_breaks says why, or set false")

    def fail(self, error: Exception) -> None:
        """Report a failed compilation, once, and run the layers without one from then on."""
        if not self.failed:
            reason = " ".join(str(error).strip().splitlines()[:2])  # torch names the backend, then the error
            self._log(f"torch_compile: failed, layers run without it ({type(error).__name__}: {reason})")
        self.failed = True


def compile_layers(
    model: PreTrainedModel,
    log: Callable[[str], None],
    *,
    recomputation: Recomputation = 0,
    backend: str | Callable[..., Any] = "inductor",
) -> int:
    """Compile each decoder layer in place; names, weights and state dict do not change.

    Only passes that train are compiled: an evaluation has other shapes, and generation one for each token. A layer that
    is recomputed as a whole is compiled inside the recomputed region, because a graph break there (such as that of an
    8-bit layer) would leave all of it uncompiled. Selective recomputation is part of the graph, because it sees no
    operations inside compiled code. Packed attention is one operator, or one kernel, and no graph break. See
    https://docs.pytorch.org/tutorials/recipes/regional_compilation.html.

    Args:
        model: The transformers model, without the PEFT model around it; adapters inside its layers are compiled too.
        log: Called with a line for what was compiled, and when that fails.
        recomputation: What is recomputed; already enabled.
        backend: Of `torch.compile`.

    Returns:
        The number of layers.

    Raises:
        UserError: If the model has no layers that can be compiled one by one.
    """
    layers = recomputable_layers(model)
    if not layers:
        raise UserError(
            f"model.torch_compile: not available for this {model.config.model_type} model, whose decoder layers "
            "transformers does not mark; set false"
        )
    if hasattr(layers[0], "compilation"):  # the model is trained a second time
        return len(layers)
    compile_backward_with_forward()
    compilation = CompilationLog(len(layers), log)
    decoder = next(module for module in model.modules() if layers[0] in _layers_of(module))
    decoder.register_forward_pre_hook(functools.partial(_begin_pass, compilation), with_kwargs=True)
    run = _selective if recomputation == "selective" else _plain
    compiled = {kind: _compiled_class(kind, compilation, run, backend) for kind in {type(layer) for layer in layers}}
    for layer in layers:
        layer.gradient_checkpointing &= run is _plain
        change_class(layer, compiled[type(layer)])
    return len(layers)


def _layers_of(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Return what stands in the lists of modules that a module has; the decoder is the one that has the layers."""
    lists = [child for child in module.children() if isinstance(child, torch.nn.ModuleList)]
    return [layer for each in lists for layer in each]


def _plain(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward


def _selective(forward: Callable[..., Any]) -> Callable[..., Any]:
    def recomputed(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        function = functools.partial(forward, self, **kwargs)
        return checkpoint(function, *args, use_reentrant=False, context_fn=selective_contexts)

    return recomputed


def _compiled_class(
    kind: type[torch.nn.Module],
    compilation: CompilationLog,
    run: Callable[[Callable[..., Any]], Callable[..., Any]],
    backend: Any,
) -> type[torch.nn.Module]:
    """Return a subclass of a layer's class whose forward pass is compiled while it trains.

    transformers recomputes around the `forward` of the outermost class, so the compiled function is what it repeats.
    """
    plain = kind.forward
    training = run(plain)
    compiled = torch.compile(training, backend=backend)

    @functools.wraps(plain)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _trains(self):
            return plain(self, *args, **kwargs)
        if compilation.failed:
            return training(self, *args, **kwargs)
        try:
            return compiled(self, *args, **kwargs)
        except compile_error() as error:
            compilation.fail(error)
            return training(self, *args, **kwargs)

    added = {"forward": forward, "compilation": compilation, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), added)


def _trains(module: torch.nn.Module) -> bool:
    return module.training and torch.is_grad_enabled()


def _begin_pass(
    compilation: CompilationLog, module: PreTrainedModel, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    if _trains(module):
        compilation.begin_pass()
    documents = kwargs.get("document_lengths")
    if documents is None:
        return args, kwargs
    if not isinstance(documents, DocumentLengths):
        documents = DocumentLengths(documents).to(module.device)
    for tensor, dim in (
        (documents.starts, 1),
        (documents.cpu_starts, 1),
        (documents.extent, 0),
        (documents.extent, 1),
    ):
        vary_size(tensor, dim)
    return args, {**kwargs, "document_lengths": documents}
