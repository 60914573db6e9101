"""Three steps of ALBEF, scripted from the objectives, against a re-statement of how ALBEF does it.

Numbers in comments are the operations of a step, in order, as models/model_pretrain.py of
salesforce/ALBEF (commit b9727e4) has them. Where ours differs on purpose, the fixed randomness and
the absence of dropout leave no difference: the momentum copy is in evaluation mode, [SEP] is never
masked, negatives come from one draw. The temperature stays within ALBEF's clamp.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import backward

from clipserve.albef import Albef, build
from training.momentum import FeatureQueue, Twin
from training.objectives.masked_language import mask_tokens, masked_language_loss
from training.objectives.matching import draw_negatives, matching_loss
from training.objectives.momentum_contrast import momentum_contrast_loss
from training.objectives.positives import find_positives

TABLE = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {
        "context_length": 7,
        "vocab_size": 30,
        "width": 16,
        "heads": 2,
        "layers": 1,
        "dropout": 0.0,
    },
    "fusion_cfg": {"layers": 1},
}
PAD, UNKNOWN, START, END, MASK = SPECIAL = (0, 1, 2, 3, 4)
BATCH, QUEUE, MOMENTUM, ALPHA, LR = 3, 5, 0.9, 0.4, 0.1
UNKNOWN_PICTURES = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
"""of each step: every pair counts as another picture (model_pretrain.py)"""
KNOWN_PICTURES = [[0, 1, 0], [2, 3, 4], [1, 5, 6]]
"""two pairs share one in the first step, one is in the queue in the third (model_retrieval.py)"""


@dataclass
class Batch:
    pixels: Tensor
    ids: Tensor
    pictures: list[int]
    picture_noise: Tensor
    text_noise: Tensor
    word_noise: Tensor


def draw_batch(step: int, pictures: list[int]) -> Batch:
    random = torch.Generator().manual_seed(step)
    ids = torch.randint(5, 30, (BATCH, 7), generator=random)
    ids[:, 0] = START
    for row, end in enumerate((6, 4, 5)):
        ids[row, end], ids[row, end + 1 :] = END, PAD
    return Batch(
        torch.randn(BATCH, 3, 16, 16, generator=random, dtype=torch.float64),
        ids,
        pictures,
        torch.rand(BATCH, BATCH, generator=random),
        torch.rand(BATCH, BATCH, generator=random),
        torch.rand(BATCH, 7, 3, generator=random) * torch.tensor([0.4, 1.0, 1.0]),
    )


@pytest.fixture
def network() -> Albef:
    torch.manual_seed(0)
    network = build(TABLE).double()
    with torch.no_grad():
        for parameter in network.parameters():  # BERT's small first weights would tell little
            parameter.add_(torch.randn(parameter.shape) * 0.2 * (parameter.ndim > 0))
    return network


class Ours:
    """A step through the functions of `training/`, in the order in which the loop calls them."""

    def __init__(self, network: Albef) -> None:
        self.network = copy.deepcopy(network)
        self.twin = Twin(self.network, MOMENTUM)
        self.queue = FeatureQueue(QUEUE, embed_dim=8)
        self.optimizer = torch.optim.SGD(self.network.parameters(), LR)

    def step(self, batch: Batch, alpha: float) -> dict[str, float]:
        network, queue = self.network, self.queue
        groups = torch.tensor(batch.pictures)[:, None]
        self.twin.update(network)
        images, texts, image, text = encode(network, batch)
        with torch.no_grad():
            twin_images, _, twin_image, twin_text = encode(self.twin.network, batch)
        scale = network.logit_scale.exp()
        terms = {
            "contrast": momentum_contrast_loss(
                image,
                text,
                twin_image,
                twin_text,
                queue.image,
                queue.text,
                scale,
                alpha,
                groups=groups,
                queue_groups=queue.groups,
            ),
            "matching": self.match(
                batch, scale, images, texts, image @ twin_text.T, text @ twin_image.T
            ),
            "language": self.guess(batch, images, twin_images, alpha),
        }
        self.optimizer.zero_grad()
        backward(torch.stack(list(terms.values())).sum())
        self.optimizer.step()
        queue.push(twin_image, twin_text, groups)
        return {name: term.item() for name, term in terms.items()}

    def match(
        self, batch: Batch, scale: Tensor, images: Tensor, texts: Tensor, i2t: Tensor, t2i: Tensor
    ) -> Tensor:
        groups = torch.tensor(batch.pictures)[:, None]
        allowed = ~find_positives(groups, groups)
        picture, has_picture = draw_negatives(scale * t2i, allowed, batch.picture_noise)
        other, has_text = draw_negatives(scale * i2t, allowed, batch.text_noise)
        picture, other = picture[has_picture], other[has_text]
        fused = self.network.fuse(
            torch.cat([texts, texts[has_picture], texts[other]]),
            torch.cat([batch.ids, batch.ids[has_picture], batch.ids[other]]),
            torch.cat([images, images[picture], images[has_text]]),
        )
        matches = torch.arange(len(fused)) < BATCH
        return matching_loss(self.network.matching_logits(fused), matches, len(fused))

    def guess(self, batch: Batch, images: Tensor, twin_images: Tensor, alpha: float) -> Tensor:
        masked, chosen = mask_tokens(batch.ids, SPECIAL, MASK, 30, batch.word_noise)

        def logits(network: Albef, states: Tensor) -> Tensor:
            fused = network.fuse(network.encode_text_states(masked)[0], masked, states)
            return network.token_logits(fused[chosen])

        assert isinstance(self.twin.network, Albef)
        with torch.no_grad():
            teacher = logits(self.twin.network, twin_images)
        student = logits(self.network, images)
        total = int(chosen.sum())
        assert total
        return masked_language_loss(student, batch.ids[chosen], total, teacher, alpha)


def encode(network: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States and unit vectors of pictures and texts."""
    assert isinstance(network, Albef)
    images, image = network.encode_image_states(batch.pixels)
    texts, text = network.encode_text_states(batch.ids)
    return images, texts, F.normalize(image, dim=1), F.normalize(text, dim=1)


@dataclass
class Slot:
    image: Tensor
    text: Tensor
    picture: int


class Restated:
    """ALBEF's own order and formulas, in float64, one row and one number at a time."""

    def __init__(self, network: Albef) -> None:
        self.online = copy.deepcopy(network)
        self.momentum = copy.deepcopy(network)
        self.queue: dict[int, Slot] = {}
        self.pointer = 0

    def step(self, batch: Batch, alpha: float) -> dict[str, float]:
        temp = torch.exp(-self.online.logit_scale)
        assert 0.001 < temp.item() < 0.5  # 1: the clamp would do nothing
        images, texts, image, text = self.encode(self.online, batch)  # 2
        with torch.no_grad():
            named = dict(self.online.named_parameters())
            for name, parameter in self.momentum.named_parameters():  # 3: before its features
                parameter.copy_(MOMENTUM * parameter + (1 - MOMENTUM) * named[name])
            images_m, _, image_m, text_m = self.encode(self.momentum, batch)
        rows = [Slot(*row) for row in zip(image_m, text_m, batch.pictures, strict=True)]
        keys = rows + list(self.queue.values())  # 4

        def scores(query: Tensor, key: Callable[[Slot], Tensor]) -> list[Tensor]:
            return [(query * key(slot)).sum() / temp for slot in keys]

        def one_way(
            query: Tensor, query_m: Tensor, key: Callable[[Slot], Tensor]
        ) -> tuple[Tensor, list[list[float]]]:
            loss, all_weights = torch.zeros((), dtype=torch.float64), []
            for i in range(BATCH):
                soft = softmax([score.detach() for score in scores(query_m[i], key)])
                log_p = [torch.log(p) for p in softmax(scores(query[i], key))]
                same = [slot.picture == batch.pictures[i] for slot in keys]
                for j in range(len(keys)):  # 5, 6
                    target = alpha * soft[j] + (1 - alpha) * same[j] / sum(same)
                    loss = loss - target * log_p[j] / BATCH
                weights = softmax(scores(query[i], key)[:BATCH])  # 8: the batch's columns only
                all_weights.append(
                    [w.item() * (not s) for w, s in zip(weights, same, strict=False)]
                )
            return loss, all_weights

        i2t, text_weights = one_way(image, image_m, lambda slot: slot.text)
        t2i, picture_weights = one_way(text, text_m, lambda slot: slot.image)
        for row in rows:  # 7: after the similarities
            self.queue[self.pointer] = row
            self.pointer = (self.pointer + 1) % QUEUE
        negatives = (picture_weights, text_weights)
        terms = {
            "contrast": (i2t + t2i) / 2,
            "matching": self.match(batch, images, texts, *negatives),
            "language": self.guess(batch, images, images_m, alpha),
        }
        total = terms["contrast"] + terms["matching"] + terms["language"]  # 10
        parameters = list(self.online.parameters())
        self.gradients = torch.autograd.grad(total, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, self.gradients, strict=True):
                parameter.sub_(LR * gradient)
        return {name: term.item() for name, term in terms.items()}

    def encode(self, network: Albef, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        images, image = network.encode_image_states(batch.pixels)
        texts, text = network.encode_text_states(batch.ids)
        image, text = (rows / (rows * rows).sum(1, keepdim=True).sqrt() for rows in (image, text))
        return images, texts, image, text

    def match(
        self,
        batch: Batch,
        images: Tensor,
        texts: Tensor,
        picture_weights: list[list[float]],
        text_weights: list[list[float]],
    ) -> Tensor:
        """8: (text, picture, whether they match) one after the other."""
        picture = [pick(w, n) for w, n in zip(picture_weights, batch.picture_noise, strict=True)]
        text = [pick(w, n) for w, n in zip(text_weights, batch.text_noise, strict=True)]
        pairs = [(i, i, 1) for i in range(BATCH)]
        pairs += [(i, picture[i], 0) for i in range(BATCH)]
        pairs += [(text[i], i, 0) for i in range(BATCH)]
        loss = torch.zeros((), dtype=torch.float64)
        for t, i, label in pairs:
            fused = self.online.fuse(texts[t : t + 1], batch.ids[t : t + 1], images[i : i + 1])
            logits = self.online.matching_logits(fused)[0]
            loss = loss - torch.log(softmax([logits[0], logits[1]])[label]) / len(pairs)
        return loss

    def guess(self, batch: Batch, images: Tensor, images_m: Tensor, alpha: float) -> Tensor:
        """9: logits of every position; only those of the chosen count."""
        masked, targets = batch.ids.clone(), {}
        ordinary = [number for number in range(30) if number not in SPECIAL]
        for i in range(BATCH):
            for t in range(7):
                choice, kind, word = batch.word_noise[i, t].tolist()
                if int(batch.ids[i, t]) in SPECIAL or choice >= 0.15:
                    continue
                targets[i, t] = int(batch.ids[i, t])
                if kind < 0.8:
                    masked[i, t] = MASK
                elif kind < 0.9:
                    masked[i, t] = ordinary[int(word * len(ordinary))]
        found = []
        for network, states in ((self.online, images), (self.momentum, images_m)):
            text_states, _ = network.encode_text_states(masked)
            found.append(network.token_logits(network.fuse(text_states, masked, states)))
        loss = torch.zeros((), dtype=torch.float64)
        for (i, t), target in targets.items():
            p, p_m = (softmax(list(logits[i, t])) for logits in found)
            hard = -torch.log(p[target])
            soft = -sum(
                (a.detach() * torch.log(b) for a, b in zip(p_m, p, strict=True)),
                start=torch.zeros((), dtype=torch.float64),
            )
            loss = loss + ((1 - alpha) * hard + alpha * soft) / len(targets)
        return loss


def softmax(scores: list[Tensor]) -> list[Tensor]:
    powers = [torch.exp(score) for score in scores]
    return [power / torch.stack(powers).sum() for power in powers]


def pick(weights: list[float], noise: Tensor) -> int:
    """One draw with these weights, by the exponential race: the key that is first to ring."""
    rings = [
        -math.log(u) / weight if weight else math.inf
        for weight, u in zip(weights, noise.tolist(), strict=True)
    ]
    return rings.index(min(rings))


pretraining_and_retrieval = pytest.mark.parametrize("pictures", [UNKNOWN_PICTURES, KNOWN_PICTURES])


@pretraining_and_retrieval
def test_three_steps_equal_a_restatement_term_by_term(
    network: Albef, pictures: list[list[int]]
) -> None:
    ours, restated = Ours(network), Restated(network)
    for step in range(3):
        batch = draw_batch(step, pictures[step])
        alpha = ALPHA * min(1, step / 2)  # its ramp, over an epoch of two steps
        found, expected = ours.step(batch, alpha), restated.step(batch, alpha)
        assert found == pytest.approx(expected, abs=1e-6)
        named = zip(ours.network.named_parameters(), restated.gradients, strict=True)
        for (name, parameter), gradient in named:
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, gradient, atol=1e-5), name


def test_twin_and_queue_after_three_steps(network: Albef) -> None:
    ours, restated = Ours(network), Restated(network)
    for step in range(3):
        batch = draw_batch(step, KNOWN_PICTURES[step])
        ours.step(batch, ALPHA)
        restated.step(batch, ALPHA)
    expected = dict(restated.momentum.named_parameters())
    for name, parameter in ours.twin.network.named_parameters():
        assert torch.allclose(parameter, expected[name], atol=1e-7), name
    moved = expected["text_projection.weight"] - network.text_projection.weight
    assert moved.abs().max() > 1e-3
    # Nine pairs went through five slots, three at a time; slot by slot they are 5, 6, 7, 8 and 4.
    assert ours.queue.groups[:, 0].tolist() == [4, 1, 5, 6, 3]
    for number, slot in restated.queue.items():
        assert torch.allclose(ours.queue.image[number].double(), slot.image, atol=1e-6)
        assert torch.allclose(ours.queue.text[number].double(), slot.text, atol=1e-6)
    assert ours.queue.cursor == restated.pointer == 4
