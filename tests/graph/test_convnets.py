"""Convolutional nets of ten shapes: what is folded where, and that smoothing changes nothing (float64, random s)."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from conv_nets import NETS
from graph_nets import affine, check_found, regions, report
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import evenbits

TABLE: dict[str, dict[str, str]] = {
    "ResNet": {
        "stem.0": "× outside",
        "blocks.0.one.0,blocks.1.one.0,blocks.1.skip.0": "stem.1,blocks.0.three.1",
        "blocks.0.two.0": "blocks.0.one.1",
        "blocks.0.three.0": "blocks.0.two.1",
        "blocks.1.two.0": "blocks.1.one.1",
        "blocks.1.three.0": "blocks.1.two.1",
        "blocks.2.one.0,head": "blocks.1.three.1,blocks.1.skip.1,blocks.2.three.1",
        "blocks.2.two.0": "blocks.2.one.1",
        "blocks.2.three.0": "blocks.2.two.1",
    },
    "ResNeXt": {
        "stem.0": "× outside",
        "blocks.0.one.0,blocks.1.one.0,blocks.1.skip.0": "stem.1,blocks.0.three.1",
        "blocks.0.two.0": "blocks.0.one.1",
        "blocks.0.three.0": "blocks.0.two.1",
        "blocks.1.two.0": "blocks.1.one.1",
        "blocks.1.three.0": "blocks.1.two.1",
        "blocks.2.one.0,head": "blocks.1.three.1,blocks.1.skip.1,blocks.2.three.1",
        "blocks.2.two.0": "blocks.2.one.1",
        "blocks.2.three.0": "blocks.2.two.1",
    },
    "MobileNetV2": {
        "stem.0": "× outside",
        "blocks.0.expand.0": "× hardtanh",
        "blocks.0.depth.0": "× hardtanh",
        "blocks.0.project.0": "× hardtanh",
        "blocks.1.expand.0": "× hardtanh",
        "blocks.1.depth.0": "× hardtanh",
        "blocks.1.project.0": "× hardtanh",
        "blocks.2.expand.0,last.0": "blocks.{1,2}.project.1",
        "blocks.2.depth.0": "× hardtanh",
        "blocks.2.project.0": "× hardtanh",
        "head.1": "× hardtanh",
    },
    "MobileNetV2 with ReLU": {
        "stem.0": "× outside",
        "blocks.{0,1}.expand.0": "stem.1,blocks.0.project.1",
        "blocks.0.depth.0": "blocks.0.expand.1",
        "blocks.0.project.0": "blocks.0.depth.1",
        "blocks.1.depth.0": "blocks.1.expand.1",
        "blocks.1.project.0": "blocks.1.depth.1",
        "blocks.2.expand.0,last.0": "blocks.{1,2}.project.1",
        "blocks.2.depth.0": "blocks.2.expand.1",
        "blocks.2.project.0": "blocks.2.depth.1",
        "head.1": "last.1",
    },
    "U-Net": {
        "down1.0": "× outside",
        "{down2,out}": "down1.1 and the rows of up1",
        "{bottom,mid}": "the rows of {down2,up2}",
        "up2": "the rows of bottom",
        "up1": "the rows of mid",
    },
    "SqueezeNet": {
        "features.0": "× outside",
        "features.3.squeeze": "the rows of features.0",
        "features.3.{one,three}": "the rows of features.3.squeeze",
        "features.4.squeeze": "the rows of features.3.{one,three}",
        "features.4.{one,three}": "the rows of features.4.squeeze",
        "classifier.1": "the rows of features.4.{one,three}",
    },
    "DenseNet": {
        "stem": "× outside",
        "convs.0": "norms.0",
        "convs.1": "norms.1",
        "head": "last",
    },
    "ConvNeXt": {
        "stem": "× outside",
        "depth": "× layer_norm",
        "up": "norm",
        "down": "× gelu",
        "head": "last",
    },
    "MobileNetV3": {
        "expand": "× outside",
        "depth": "× hardswish",
        "squeeze": "× hardswish",
        "excite": "the rows of squeeze",
        "project": "× hardsigmoid",
    },
    "MobileNetV3 with ReLU": {
        "expand": "× outside",
        "depth": "the rows of expand",
        "{squeeze,project}": "the rows of depth",
        "excite": "the rows of squeeze",
    },
}


def cut(text: str) -> str:
    text = text.replace("its tensor comes from outside the model", "outside")
    return re.sub(r"its tensor is also read by (\w+) .*|computed by (\w+), through .*", r"\1\2", text)


@pytest.mark.parametrize("name", NETS)
def test_regions_and_smoothing_of(name: str) -> None:
    model, x = affine(NETS[name]()).double().eval(), torch.randn(2, 3, 16, 16).double()
    with torch.no_grad():
        found = regions(model, x)
        assert {cut(region): cut(where) for region, where in report(found).items()} == TABLE[name]
        check_found(model, lambda: model(x), found)


def fused(model: nn.Module) -> nn.Module:
    """With every BatchNorm in the weights of the convolution before it."""
    for module in model.modules():
        if isinstance(module, nn.Sequential) and len(module) > 1 and isinstance(module[1], nn.BatchNorm2d):
            module[0], module[1] = fuse_conv_bn_eval(module[0], module[1]), nn.Identity()
    return model


@pytest.mark.parametrize("name", ["ResNet", "MobileNetV2 with ReLU"])
def test_with_batch_norm_fused_the_same_regions_are_folded_into_rows(name: str) -> None:
    model, x = fused(affine(NETS[name]()).double().eval()), torch.randn(2, 3, 16, 16).double()
    with torch.no_grad():
        found = report(regions(model, x))
        assert list(found) == list(TABLE[name])
        for region, where in TABLE[name].items():
            rows = ",".join(norm.removesuffix(".1") + ".0" for norm in re.split(r",(?![^{]*})", where))
            assert cut(found[region]) in (where, f"the rows of {rows}")
        check_found(model, lambda: model(x), regions(model, x))


@pytest.mark.parametrize("name", NETS)
def test_quantize_folds_what_the_table_says_and_keeps_the_output(name: str) -> None:
    model, data = affine(NETS[name]()).eval(), [torch.randn(2, 3, 16, 16) for _ in range(2)]
    before = copy.deepcopy(model)
    result = evenbits.quantize(model, scheme="W8A8", method="smoothquant", data=data)
    statuses = {row.name: row.status for row in result.regions}
    assert statuses == {region: "multiplied" if where[0] == "×" else "folded" for region, where in TABLE[name].items()}
    with torch.no_grad():
        error = (model(data[0]) - before(data[0])).norm() / before(data[0]).norm()
    assert 1e-6 < error < 0.05
