"""From each configured objective to its loss: which of a step's tensors go into which function.

A term is this rank's share of a mean over the global batch; the shares of all ranks add up to it.
Start at `compute`. The formulas are in `training/objectives/`, one file each.

Legend: B own rows, N global batch, E embedding, T text tokens, R rows that are matched.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipserve import objectives as kinds
from clipserve.albef import Albef
from clipserve.model import Encoded, Model
from clipserve.towers import trunk_features
from training.forward import Step, ask_teacher
from training.networks import method_of
from training.objectives.captioning import caption_tokens
from training.objectives.contrastive import contrastive_loss
from training.objectives.distillation import affinity_distillation_loss, feature_distillation_loss
from training.objectives.exact import in_float32
from training.objectives.masked_language import mask_tokens, masked_language_loss
from training.objectives.matching import count_right, draw_negatives, matching_loss
from training.objectives.momentum_contrast import momentum_contrast_loss
from training.objectives.positives import find_positives
from training.objectives.sigmoid import sigmoid_ring_loss
from training.ring import ring


def compute(objective: kinds.Objective, step: Step) -> Tensor:
    """This rank's share of one objective's loss, () float32; without its weight."""
    return _TERMS[type(objective)](objective, step)


def _contrastive(objective: kinds.Contrastive, step: Step) -> Tensor:
    return contrastive_loss(
        step.image,
        step.text,
        step.scale,
        own=step.own,
        groups=step.same(objective.positives),
        tile_size=objective.tile_size,
    )


def _momentum_contrast(objective: kinds.MomentumContrast, step: Step) -> Tensor:
    queue, momentum = step.networks.queue, step.momentum
    assert queue is not None
    assert momentum is not None
    return momentum_contrast_loss(
        step.encoded.image,
        step.encoded.text,
        momentum.image,
        momentum.text,
        queue.image,
        queue.text,
        step.scale,
        objective.alpha * step.ramp,
        own=step.own,
        groups=step.same(objective.positives),
        queue_groups=step.queued(objective.positives),
    )


def _matching(objective: kinds.Matching, step: Step) -> Tensor:
    """Positives, then each caption with a hard negative picture, then the other way round."""
    network: Albef = step.networks.model.network
    own = step.own
    images, texts, ids = _candidates(objective, step)
    columns = own if objective.negatives == "process" else slice(None)
    seen = step if step.momentum is None else step.momentum
    picture_of, has_picture = _draw(objective, step, step.text, seen.image, columns)
    text_of, has_text = _draw(objective, step, step.image, seen.text, columns)
    found = step.count(int(has_picture.sum() + has_text.sum()))
    step.reports["matching/skipped"] = step.scale.new_tensor(not found) / step.world.size
    if not found:  # every rank's graph is still the same
        return images[:0].float().sum() + texts[:0].float().sum()
    pairs = torch.arange(len(ids), device=ids.device)
    if objective.negatives == "batch":
        pairs = pairs[own]
    pictures = torch.cat([pairs, picture_of[has_picture], pairs[has_text]])  # (R,)
    captions = torch.cat([pairs, pairs[has_picture], text_of[has_text]])

    def judge(rows: slice, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        captions_of, pictures_of = captions[rows], pictures[rows]
        fused = network.fuse(texts[captions_of], ids[captions_of], images[pictures_of])
        return (network.matching_logits(fused),)

    (logits,) = step.networks.parts(judge, len(pictures), images, texts)  # (R, 2)
    matches = torch.arange(len(logits), device=logits.device) < len(pairs)
    total = step.size + found
    step.reports["matching/accuracy"] = count_right(logits, matches) / total
    return matching_loss(logits, matches, total)


def _draw(
    objective: kinds.Matching, step: Step, queries: Tensor, keys: Tensor, columns: slice
) -> tuple[Tensor, Tensor]:
    """For each own query a hard negative among the keys' `columns`, and whether there is one."""
    noise = step.noise(step.size, step.size)[step.own, columns]
    with torch.no_grad(), in_float32(queries.device):
        similarity = step.scale * queries[step.own].float() @ keys[columns].float().T
        groups = step.same(objective.positives)
        if groups is None:  # then only its own partner is a positive
            groups = torch.arange(step.size, device=queries.device)[:, None]
        allowed = ~find_positives(groups[step.own], groups[columns])
    return draw_negatives(similarity, allowed, noise)


def _candidates(objective: kinds.Matching, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """Image states, text states and token ids of the pairs that negatives may come from."""
    images, texts, ids = step.encoded.image_states, step.encoded.text_states, step.batch.ids
    assert images is not None
    assert texts is not None
    if objective.negatives == "process":
        return images, texts, ids
    longest = int(step.world.exchange(texts.shape[1]).max())
    texts = F.pad(texts, (0, 0, 0, longest - texts.shape[1]))
    ids = F.pad(ids, (0, longest - ids.shape[1]))
    gathered = (step.world.gather(part, step.counts) for part in (images, texts, ids))
    images, texts, ids = gathered
    return images, texts, ids


def _masked_language(objective: kinds.MaskedLanguage, step: Step) -> Tensor:
    """Only masked positions reach the vocabulary, here and in the momentum copy."""
    model = step.networks.model
    tokenizer, ids = model.tokenizer, step.batch.ids
    assert tokenizer.mask_id is not None
    noise = step.noise(step.size, model.context_length, 3)[step.own, : ids.shape[1]]
    masked, chosen = mask_tokens(
        ids,
        tokenizer.special_ids,
        tokenizer.mask_id,
        tokenizer.vocab_size,
        noise,
        objective.probability,
    )
    total = step.count(int(chosen.sum()))
    teacher, alpha = None, objective.alpha * step.ramp
    if alpha:
        assert step.networks.momentum is not None
        assert step.momentum is not None
        with torch.no_grad():
            teacher = _guess(step, step.networks.momentum, masked, chosen, step.momentum.encoded)
    logits = _guess(step, model, masked, chosen, step.encoded)
    step.reports["masked_language/accuracy"] = (logits.argmax(1) == ids[chosen]).sum() / max(
        total, 1
    )
    return masked_language_loss(logits, ids[chosen], total, teacher, alpha)


def _guess(step: Step, model: Model, masked: Tensor, chosen: Tensor, seen: Encoded) -> Tensor:
    """(M, V) logits of the masked words, with the pictures in view."""
    network: Albef = model.network
    assert seen.image_states is not None

    def guess(rows: slice, masked: Tensor, images: Tensor) -> tuple[Tensor, ...]:
        states, _ = network.encode_text_states(masked[rows])
        fused = network.fuse(states, masked[rows], images[rows])
        return (network.token_logits(fused[chosen[rows]]),)

    return step.networks.parts(guess, len(masked), masked, seen.image_states)[0]


def _sigmoid(objective: kinds.Sigmoid, step: Step) -> Tensor:
    assert step.bias is not None
    blocks: Iterable[tuple[slice, Tensor]] = [(slice(0, step.size), step.text)]
    if objective.exchange == "ring":
        blocks = ring(step.encoded.text, step.counts, step.world)
    return sigmoid_ring_loss(
        step.encoded.image,
        blocks,
        step.scale,
        step.bias,
        own=step.own,
        total=step.size,
        groups=step.same(objective.positives),
        chunk_size=objective.chunk_size,
    )


def _distillation(objective: kinds.Distillation, step: Step) -> Tensor:
    """Features of own rows as the teacher's, and the batch's similarities as the teacher sees."""
    teacher, heads = step.networks.teacher, step.networks.heads
    assert teacher is not None
    known = ask_teacher(step, teacher)
    own = (step.encoded.image, step.encoded.text)
    loss = step.encoded.image.new_zeros(())
    if objective.features:
        names = ("distill_image", "distill_text")
        mapped = [heads[n](x) if n in heads else x for n, x in zip(names, own, strict=True)]
        pairs = zip(mapped, known, strict=True)
        terms = [feature_distillation_loss(ours, theirs, step.size) for ours, theirs in pairs]
        loss = loss + objective.features * sum(terms) / 2
    if objective.affinity:
        image, text = (step.world.gather(part, step.counts) for part in known)
        loss = loss + objective.affinity * affinity_distillation_loss(
            step.image, step.text, image, text, step.scale, teacher.logit_scale, own=step.own
        )
    return loss


def _self_supervision(objective: kinds.SimCLR | kinds.Agreement, step: Step) -> Tensor:
    """Both views through the image tower and the head, then compared over the whole batch."""
    model, views = step.networks.model, step.batch.views
    loss = method_of(objective).loss
    head = step.networks.heads[objective.name]
    if views is None:  # this rank has no pictures: its blank one takes part without a row
        views = torch.zeros(2, 1, 3, *model.transform.size, dtype=torch.uint8, device=model.device)
    count = len(step.batch.samples)

    def encode(rows: slice, views: Tensor) -> tuple[Tensor, ...]:
        normal = model.transform.normalize(views[rows]).to(model.dtype)
        return (trunk_features(model.network.visual, normal),)

    pixels = views.flatten(0, 1)  # (2B, 3, H, W)
    views_of = step.networks.parts(encode, len(pixels), pixels)[0].chunk(2)  # (B, F) each
    rows = [step.world.gather(head(view[:count]), step.counts) for view in views_of]
    return loss(rows[0], rows[1], own=step.own)


def _captioning(objective: kinds.Captioning, step: Step) -> Tensor:
    pad_id = step.networks.model.network.pad_id
    assert step.word_loss is not None
    total = step.count(caption_tokens(step.batch.ids[:, 1:], pad_id))
    return step.word_loss.sum() / max(total, 1)


_TERMS: dict[type, Callable[[Any, Step], Tensor]] = {
    kinds.Contrastive: _contrastive,
    kinds.Sigmoid: _sigmoid,
    kinds.MomentumContrast: _momentum_contrast,
    kinds.Matching: _matching,
    kinds.MaskedLanguage: _masked_language,
    kinds.Distillation: _distillation,
    kinds.SimCLR: _self_supervision,
    kinds.Agreement: _self_supervision,
    kinds.Captioning: _captioning,
}
