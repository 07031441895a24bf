"""What is for vLLM imports without it: it is looked for when a model is loaded."""

import pytest
from rewardserve.engine.vllm_options import VllmOptions
from rewardserve.errors import LoadFailed


async def test_without_vllm_a_model_is_refused_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from rewardserve.engine import vllm_load

    monkeypatch.setattr(vllm_load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoadFailed, match="vLLM is not installed"):
        await vllm_load.load(VllmOptions(source="/nowhere", reason="asked for"), lambda step: None)
