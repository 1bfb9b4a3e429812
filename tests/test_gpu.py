"""What only a GPU shows: streams, offsets beyond 32 bits, a second device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from automagic_bnb import Automagic8bit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def parameter(*shape: int, device: str = "cuda") -> Any:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device))


@pytest.mark.parametrize("options", [{}, {"lr": None}, {"percentile_clipping": 50}], ids=str)
def test_a_step_follows_the_current_stream(options: dict[str, Any]) -> None:
    """A gradient that is still being made there is waited for: until then it holds NaN, which a step skips."""
    gradient = torch.randn(512, 512, generator=torch.Generator().manual_seed(1)).cuda()
    results = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        p = parameter(512, 512)
        opt = Automagic8bit([p], **{"lr": 1e-2, **options})
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            for step in range(2):
                p.grad = torch.full_like(p, float("nan"))
                torch.cuda._sleep(20_000_000)  # some 10 ms
                p.grad.copy_(gradient * (1 + step))
                opt.step()
        torch.cuda.synchronize()
        results.append((p.detach().clone(), opt.state[p]["tensor_stats"].clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], parameter(512, 512))


def test_more_than_two_to_the_31_elements() -> None:
    """The blocks at the end, and on both sides of 2^31, become what they become in a small parameter."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of free memory")
    size = 2**31 + 512
    small, large = (torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device="cuda")) for n in (768, size))
    for p in (small, large):
        p.grad = torch.full_like(p, 1e-3)
        p.grad[-256:] = -2e-3
        opt = Automagic8bit([p], lr=0.1, min_8bit_size=0, stochastic_rounding=False, weight_decay=0.0)
        opt.step()
        assert float(opt.state[p]["tensor_stats"][3]) == 0
    small, large = small.detach(), large.detach()
    first, last = small[:256], small[-256:]
    assert (first < 1).all()
    assert (last > 1).all()
    for start in (0, 2**31 - 256, 2**31):
        assert torch.equal(large[start : start + 256], first)
    assert torch.equal(large[-256:], last)
    assert float(large[:-256].max()) == float(first[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
@pytest.mark.parametrize("lr", [1e-2, None])
def test_a_model_on_another_device_than_the_current(lr: float | None, tools: Any) -> None:
    """The same numbers as on the current one."""
    results = []
    for device in ("cuda:0", "cuda:1"):
        p = [parameter(64, 96, device=device), parameter(300, device=device)]
        opt = Automagic8bit(p, lr=lr, lora=True)
        tools.train(opt, p, range(12))
        results.append([x.detach().cpu() for x in p])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
