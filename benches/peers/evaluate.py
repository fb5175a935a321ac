"""kNN, linear probe and linear CKA with scikit-learn and NumPy. Variants: `f32`, `f64` (the type of the features)."""

import time

import numpy
import sklearn
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler, normalize

import tensors

VOTE_TEMPERATURE = 0.07


def linear_cka(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    scale = numpy.linalg.norm(x.T @ x) * numpy.linalg.norm(y.T @ y)
    return numpy.linalg.norm(y.T @ x) ** 2 / scale


class Side:
    def __init__(self, plan, arguments):
        arrays = tensors.load(arguments.folder / "embeddings.safetensors")
        kind = {"f32": numpy.float32, "f64": numpy.float64}[arguments.variant]
        self.x, self.y = arrays["x"].astype(kind), arrays["y"].astype(kind)
        self.labels, self.bank, self.k = arrays["labels"], plan["bank"], plan["k"]
        self.versions = {"scikit-learn": sklearn.__version__, "numpy": numpy.__version__}
        self.description = f"scikit-learn and NumPy, {arguments.variant}"
        self.check = self.repeat()

    @staticmethod
    def cpu_seconds():
        return time.process_time()

    def knn(self):
        # Of unit vectors d^2 / 2 is one minus the cosine; scikit-learn has its fast search for Euclidean distances.
        unit = normalize(self.x)
        votes = KNeighborsClassifier(
            self.k, algorithm="brute", weights=lambda d: numpy.exp(-d * d / 2 / VOTE_TEMPERATURE)
        )
        votes.fit(unit[: self.bank], self.labels[: self.bank])
        return votes.score(unit[self.bank :], self.labels[self.bank :])

    def linear(self):
        scaler = StandardScaler().fit(self.x[: self.bank])
        # Our side's stopping rule: no component of the mean loss's gradient is larger than tol.
        probe = LogisticRegression(C=1.0, tol=1e-5, max_iter=300)
        probe.fit(scaler.transform(self.x[: self.bank]), self.labels[: self.bank])
        return probe.score(scaler.transform(self.x[self.bank :]), self.labels[self.bank :])

    def repeat(self):
        return [float(self.knn()), float(self.linear()), float(linear_cka(self.x, self.y))]
