"""What a run is: one YAML file, typed and validated. Nothing here imports jax."""

from arcticjax.config.contract import TextContract
from arcticjax.config.fields import describe
from arcticjax.config.load import differences, dump_config, load, load_config
from arcticjax.config.mining import ContractConfig, InputConfig, MineConfig
from arcticjax.config.schema import (
    CheckpointConfig,
    DataConfig,
    DocstringsConfig,
    EvaluationConfig,
    ExportConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ReportConfig,
    RunConfig,
    RunSection,
    SourceConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "ContractConfig",
    "DataConfig",
    "DocstringsConfig",
    "EvaluationConfig",
    "ExportConfig",
    "InputConfig",
    "LossConfig",
    "MeshConfig",
    "MineConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ReportConfig",
    "RunConfig",
    "RunSection",
    "SourceConfig",
    "TextContract",
    "TrainConfig",
    "describe",
    "differences",
    "dump_config",
    "load",
    "load_config",
]
