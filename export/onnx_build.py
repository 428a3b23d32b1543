"""A small builder of ONNX graphs: every value named, typed and shaped as it is made."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ranvier.export.nodes import Shape

OPSET = 17
IR_VERSION = 8  # what ONNX Runtime 1.18, the oldest that we run on, reads
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
BATCH = "batch"


class Body:
    """The nodes of one ONNX graph. Constants go to `constants`, which a loop's body shares."""

    def __init__(self, constants: dict[str, onnx.TensorProto]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.infos: dict[str, onnx.ValueInfoProto] = {}
        self.constants = constants
        self._n = 0

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """The name of a constant; equal ones are kept once."""
        array = np.ascontiguousarray(np.asarray(value, dtype)).reshape(np.shape(value))
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:24]
        key = f"const/{array.dtype}/{list(array.shape)}/{digest}"
        if key not in self.constants:
            self.constants[key] = numpy_helper.from_array(array, key)
        return key

    def op(
        self,
        kind: str,
        inputs: list[str],
        shape: Shape,
        name: str = "",
        dtype: int = FLOAT,
        lead: tuple[Any, ...] = (BATCH,),
        **attributes: Any,
    ) -> str:
        """Adds one operator; returns the name of its value `[*lead, *shape]`."""
        self._n += 1
        name = name or f"v{self._n}/{kind}"
        self.nodes.append(
            helper.make_node(kind, inputs, [name], name=f"{name}:{kind}", **attributes)
        )
        self.infos[name] = tensor(name, (*lead, *shape), dtype)
        return name

    def rename(self, value: str, name: str) -> None:
        """Gives `value` the name `name` too, as graph outputs need their own."""
        info = self.infos[value]
        self.nodes.append(helper.make_node("Identity", [value], [name], name=f"{name}:Identity"))
        self.infos[name] = onnx.ValueInfoProto()
        self.infos[name].CopyFrom(info)
        self.infos[name].name = name

    def graph(self, name: str, inputs: list[Any], outputs: list[str]) -> onnx.GraphProto:
        ends = {i.name for i in inputs} | set(outputs)
        inner = [info for key, info in self.infos.items() if key not in ends]
        return helper.make_graph(
            self.nodes, name, inputs, [self.infos[o] for o in outputs], value_info=inner
        )


def tensor(name: str, shape: tuple[Any, ...], dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, list(shape))
