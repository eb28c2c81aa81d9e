"""Masks of nn.Transformer: PyTorch compares their values for the sake of speed, which a graph cannot."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import transformer

import ekgfx
from ekgfx.surgery.check import perturb, relative_error


class Translator(nn.Module):
    def __init__(self, causal: bool, hint: bool | None) -> None:
        super().__init__()
        self.causal, self.hint = causal, hint
        self.embed, self.out = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.core = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = self.core.generate_square_subsequent_mask(target.shape[1], dtype=self.embed.weight.dtype)
        mask = mask if self.causal else mask.mT
        return self.out(self.core(self.embed(source), self.embed(target), tgt_mask=mask, tgt_is_causal=self.hint))


def tokens(batch: int, length: int = 5) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(batch)
    return torch.randint(11, (batch, 7), generator=draw), torch.randint(11, (batch, length), generator=draw)


@pytest.mark.parametrize(("causal", "hint"), [(True, None), (False, None), (True, True)])
def test_a_mask_is_applied_whether_it_is_said_to_be_causal_or_not(causal: bool, hint: bool | None) -> None:
    torch.manual_seed(0)
    model = Translator(causal, hint).double().eval()
    perturb(model)
    own = transformer._detect_is_causal_mask
    traced = ekgfx.trace(model, tokens(2))
    assert transformer._detect_is_causal_mask is own
    assert relative_error(traced.subnetwork()(*tokens(3)), model(*tokens(3))) < 1e-12
    plan = ekgfx.Plan({name: tuple(range(0, group.size, 2)) for name, group in traced.groups.items()})
    pruned = ekgfx.prune(model, plan, traced)
    assert not ekgfx.replaced(pruned)
    assert relative_error(traced.subnetwork(plan)(*tokens(3)), pruned(*tokens(3))) < 1e-12
    later = tokens(3, 9)
    swapped = later[0], torch.cat([later[1][:, :1], (later[1][:, 1:] + 1) % 11], 1)
    first = [pruned.eval()(*arguments)[:, 0] for arguments in (later, swapped)]
    assert (relative_error(*first) < 1e-12) is causal, "the first token must not see later ones, or must"
