"""RoBERTa encoder whose top hidden states are returned. Shapes: B batch, L tokens, D hidden."""

from typing import Any

from torch import Tensor, nn
from transformers import RobertaConfig
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings, RobertaEncoder

from mt_deepspeed.config.model import TextTowerConfig
from mt_deepspeed.models.partition import init_weights


class TextTower(nn.Module):
    """Post-norm RoBERTa without pooler, SDPA attention, transformers' parameter names.

    Args:
        config: Sizes.
        num_states: How many top layers' outputs are returned.
        init_std: See `ModelConfig.init_std`.
    """

    def __init__(self, config: TextTowerConfig, num_states: int, init_std: float) -> None:
        super().__init__()
        self.num_states = num_states
        roberta = roberta_config(config)
        # The parts and not `RobertaModel`: its own initialisation fails on parameters split by zero.Init.
        self.embeddings = RobertaEmbeddings(roberta)
        self.encoder = RobertaEncoder(roberta)
        init_weights(self, init_std)

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> list[Tensor]:
        """Encodes a batch of texts.

        Args:
            ids_BL: int64 token ids; positions count the tokens that are not padding ids.
            mask_BL: 1 where a token is, 0 at padding.

        Returns:
            `num_states` tensors `[B, L, D]`, lowest layer first.
        """
        hidden = self.embeddings(input_ids=ids_BL)
        attend_B11L = mask_BL.bool()[:, None, None, :]
        states = []
        for layer in self.encoder.layer:
            hidden = layer(hidden, attend_B11L)
            states.append(hidden)
        return states[-self.num_states :]


def roberta_config(config: TextTowerConfig, **more: Any) -> RobertaConfig:
    """The same sizes as transformers names them; `more` are further arguments of `RobertaConfig`."""
    roberta = RobertaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_positions,
        type_vocab_size=config.type_vocab_size,
        pad_token_id=config.pad_token_id,
        hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        **more,
    )
    roberta._attn_implementation = "sdpa"
    return roberta
