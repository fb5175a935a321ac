"""Features of a batch of images, without decoding. Variants: `eager` (PyTorch f32), `onnxruntime`."""

import pathlib
import tempfile

import onnxruntime
import torch

import models
import tensors
from runtime import TorchSide, channels_last


def session(encoder, images, threads):
    """onnxruntime on the same weights, exported by PyTorch for this very shape."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    # Between two repetitions the cores belong to the other sides.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = str(pathlib.Path(folder) / "encoder.onnx")
        torch.onnx.export(encoder, (images,), path, input_names=["images"], dynamo=True, verbose=False)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Side(TorchSide):
    def __init__(self, plan, arguments):
        super().__init__(arguments.threads)
        self.inner = plan["inner"]
        encoder = models.load(models.encoder(plan), tensors.load(arguments.folder / "encoder.safetensors")).eval()
        images = torch.from_numpy(tensors.load(arguments.folder / "images.safetensors")["images"])
        if arguments.variant == "onnxruntime":
            running, array = session(encoder, images, arguments.threads), images.numpy()
            self.embed = lambda: running.run(None, {"images": array})[0]
            self.versions["onnxruntime"] = onnxruntime.__version__
            self.description = "onnxruntime"
        else:
            if plan["architecture"].startswith("resnet"):
                encoder, images = channels_last(encoder), channels_last(images)
            self.embed = lambda: encoder(images).numpy()
            self.description = "PyTorch eager"
        with torch.inference_mode():
            self.check = self.embed()[0, : plan["checked_values"]].tolist()

    def repeat(self):
        with torch.inference_mode():
            for _ in range(self.inner):
                self.embed()
