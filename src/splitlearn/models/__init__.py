"""Models: functions that return an `nn.Sequential` of named blocks. A network is cut between two blocks."""

from splitlearn.models.lenet import lenet
from splitlearn.models.mlp import mlp
from splitlearn.models.resnet import resnet18, resnet50
from splitlearn.models.vgg import vgg11, vgg16

__all__ = ["lenet", "mlp", "resnet18", "resnet50", "vgg11", "vgg16"]
