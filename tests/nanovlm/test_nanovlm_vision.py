"""The vision encoder and the projector, against nanoVLM's results and transformers' SigLIP."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vlm_cases import TOLERANCE, case

from kvist.errors import CheckpointError, ConfigError, NotSupported
from kvist.loading.checkpoint import open_checkpoint
from kvist.loading.vision_tower import load_vision_tower, read_vision_config
from kvist.models.nanovlm import Projector
from kvist.models.siglip import VisionConfig, VisionEncoder

SMALL = VisionConfig(
    hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, image_size=24, patch_size=8
)


@pytest.mark.parametrize("name", ["vlm_tied", "vlm_untied"])
def test_encoder_and_projector_give_nanovlms_embeddings(name: str) -> None:
    reference, model = case(name).ref, case(name).loaded.model
    pixels = reference["vlm.one_image.pixels.0"]
    with torch.inference_mode():
        hidden = model.vision(pixels)
        embeddings = model.encode_images(pixels)
    expected = reference["vlm.one_image.vision_hidden"]
    torch.testing.assert_close(hidden, expected, atol=TOLERANCE, rtol=0)
    expected = reference["vlm.one_image.image_embeds"]
    torch.testing.assert_close(embeddings, expected, atol=TOLERANCE, rtol=0)


def test_pixels_of_another_dtype_are_taken_in_the_models() -> None:
    model, pixels = case("vlm_tied").loaded.model, torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(
            model.encode_images(pixels.bfloat16()), model.encode_images(pixels.bfloat16().float())
        )


def test_pixel_shuffle_joins_each_square_of_patches() -> None:
    projector = Projector(replace(SMALL, hidden_size=2, image_size=32), 2, 8)
    with torch.inference_mode():
        projector.proj.weight.copy_(torch.eye(8))
    patches = torch.arange(16.0).view(4, 4)
    x = torch.stack((patches, patches + 100), dim=-1).view(1, 16, 2)
    first = projector(x)[0, 0].tolist()
    assert first == [0, 100, 1, 101, 4, 104, 5, 105]


def test_class_token_alone_comes_out_where_there_is_one() -> None:
    torch.manual_seed(0)
    encoder = VisionEncoder(replace(SMALL, class_token=True))
    assert encoder(torch.rand(2, 3, 24, 24)).shape == (2, 32)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="hidden size 32 is not a multiple of its 3 heads"):
        replace(SMALL, num_heads=3)
    with pytest.raises(ConfigError, match="image size 20"):
        replace(SMALL, image_size=20)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=24,
        patch_size=8,
    )
    tower = transformers.SiglipVisionModel(config)
    with torch.no_grad():
        for parameter in tower.parameters():  # biases and norms too, or they would hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.1)
    path = tmp_path_factory.mktemp("siglip")
    tower.save_pretrained(path)
    return path


def test_siglip_tower_of_transformers_gives_its_hidden_states(siglip: Path) -> None:
    import transformers

    theirs = transformers.SiglipVisionModel.from_pretrained(siglip).eval()
    ours = load_vision_tower(open_checkpoint(siglip), dtype=torch.float32, device="cpu")
    pixels = torch.rand(3, 3, 24, 24)
    with torch.inference_mode():
        expected = theirs(pixels).last_hidden_state
        torch.testing.assert_close(ours(pixels), expected, atol=1e-5, rtol=0)


def test_tower_that_lacks_a_layer_says_what_is_missing(siglip: Path) -> None:
    checkpoint = open_checkpoint(siglip)
    checkpoint.config["num_hidden_layers"] = 3
    with pytest.raises(CheckpointError, match=r"missing \(blocks\.2"):
        load_vision_tower(checkpoint, dtype=torch.float32, device="cpu")


def test_hub_configs_leave_out_transformers_defaults() -> None:
    config = read_vision_config({"model_type": "siglip", "vision_config": {"image_size": 512}})
    assert (config.hidden_size, config.num_layers, config.grid) == (768, 12, 32)


def test_other_towers_are_refused_by_name() -> None:
    with pytest.raises(NotSupported, match="clip_vision_model"):
        read_vision_config({"model_type": "clip_vision_model"})
    with pytest.raises(NotSupported, match="NaFlex"):
        read_vision_config({"model_type": "siglip2_vision_model", "num_patches": 256})
