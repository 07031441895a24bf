from rewardserve.v1 import scoring_pb2 as _scoring_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ModelState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_STATE_UNSPECIFIED: _ClassVar[ModelState]
    MODEL_STATE_LOADING: _ClassVar[ModelState]
    MODEL_STATE_SERVING: _ClassVar[ModelState]
    MODEL_STATE_RESTARTING: _ClassVar[ModelState]
    MODEL_STATE_DRAINING: _ClassVar[ModelState]
    MODEL_STATE_FAILED: _ClassVar[ModelState]

class ExecutionPath(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXECUTION_PATH_UNSPECIFIED: _ClassVar[ExecutionPath]
    EXECUTION_PATH_PACKED: _ClassVar[ExecutionPath]
    EXECUTION_PATH_PADDED: _ClassVar[ExecutionPath]
    EXECUTION_PATH_VLLM: _ClassVar[ExecutionPath]
MODEL_STATE_UNSPECIFIED: ModelState
MODEL_STATE_LOADING: ModelState
MODEL_STATE_SERVING: ModelState
MODEL_STATE_RESTARTING: ModelState
MODEL_STATE_DRAINING: ModelState
MODEL_STATE_FAILED: ModelState
EXECUTION_PATH_UNSPECIFIED: ExecutionPath
EXECUTION_PATH_PACKED: ExecutionPath
EXECUTION_PATH_PADDED: ExecutionPath
EXECUTION_PATH_VLLM: ExecutionPath

class Model(_message.Message):
    __slots__ = ("name", "version", "state", "message", "source", "architecture", "path", "path_reason", "dtype", "device", "num_parameters", "max_length", "vocab_size", "has_tokenizer", "has_chat_template", "prompt_tokenized_once", "canary_error", "num_restarts", "prefix_cache_tokens", "attributes", "scores_steps", "members", "aggregate")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    PATH_REASON_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    HAS_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENIZED_ONCE_FIELD_NUMBER: _ClassVar[int]
    CANARY_ERROR_FIELD_NUMBER: _ClassVar[int]
    NUM_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    SCORES_STEPS_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    AGGREGATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    state: ModelState
    message: str
    source: str
    architecture: str
    path: ExecutionPath
    path_reason: str
    dtype: str
    device: str
    num_parameters: int
    max_length: int
    vocab_size: int
    has_tokenizer: bool
    has_chat_template: bool
    prompt_tokenized_once: bool
    canary_error: float
    num_restarts: int
    prefix_cache_tokens: int
    attributes: _containers.RepeatedScalarFieldContainer[str]
    scores_steps: bool
    members: _containers.RepeatedScalarFieldContainer[str]
    aggregate: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., state: _Optional[_Union[ModelState, str]] = ..., message: _Optional[str] = ..., source: _Optional[str] = ..., architecture: _Optional[str] = ..., path: _Optional[_Union[ExecutionPath, str]] = ..., path_reason: _Optional[str] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., num_parameters: _Optional[int] = ..., max_length: _Optional[int] = ..., vocab_size: _Optional[int] = ..., has_tokenizer: bool = ..., has_chat_template: bool = ..., prompt_tokenized_once: bool = ..., canary_error: _Optional[float] = ..., num_restarts: _Optional[int] = ..., prefix_cache_tokens: _Optional[int] = ..., attributes: _Optional[_Iterable[str]] = ..., scores_steps: bool = ..., members: _Optional[_Iterable[str]] = ..., aggregate: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class LoadModelRequest(_message.Message):
    __slots__ = ("name", "source", "dtype")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: str
    dtype: str
    def __init__(self, name: _Optional[str] = ..., source: _Optional[str] = ..., dtype: _Optional[str] = ...) -> None: ...

class UnloadModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnloadModelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CanaryPair(_message.Message):
    __slots__ = ("prompt", "better", "worse")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    BETTER_FIELD_NUMBER: _ClassVar[int]
    WORSE_FIELD_NUMBER: _ClassVar[int]
    prompt: _scoring_pb2.Prompt
    better: _scoring_pb2.Response
    worse: _scoring_pb2.Response
    def __init__(self, prompt: _Optional[_Union[_scoring_pb2.Prompt, _Mapping]] = ..., better: _Optional[_Union[_scoring_pb2.Response, _Mapping]] = ..., worse: _Optional[_Union[_scoring_pb2.Response, _Mapping]] = ...) -> None: ...

class SwapModelRequest(_message.Message):
    __slots__ = ("name", "source", "dtype", "canaries", "min_canary_accuracy", "shadow_share", "shadow_requests", "shadow_timeout_s", "min_rank_correlation", "keep_previous")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CANARIES_FIELD_NUMBER: _ClassVar[int]
    MIN_CANARY_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    SHADOW_SHARE_FIELD_NUMBER: _ClassVar[int]
    SHADOW_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    SHADOW_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    MIN_RANK_CORRELATION_FIELD_NUMBER: _ClassVar[int]
    KEEP_PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: str
    dtype: str
    canaries: _containers.RepeatedCompositeFieldContainer[CanaryPair]
    min_canary_accuracy: float
    shadow_share: float
    shadow_requests: int
    shadow_timeout_s: float
    min_rank_correlation: float
    keep_previous: bool
    def __init__(self, name: _Optional[str] = ..., source: _Optional[str] = ..., dtype: _Optional[str] = ..., canaries: _Optional[_Iterable[_Union[CanaryPair, _Mapping]]] = ..., min_canary_accuracy: _Optional[float] = ..., shadow_share: _Optional[float] = ..., shadow_requests: _Optional[int] = ..., shadow_timeout_s: _Optional[float] = ..., min_rank_correlation: _Optional[float] = ..., keep_previous: bool = ...) -> None: ...

class SwapModelResponse(_message.Message):
    __slots__ = ("model", "previous_version", "num_canaries", "num_canaries_right", "num_shadow_requests", "rank_correlation")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_CANARIES_FIELD_NUMBER: _ClassVar[int]
    NUM_CANARIES_RIGHT_FIELD_NUMBER: _ClassVar[int]
    NUM_SHADOW_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RANK_CORRELATION_FIELD_NUMBER: _ClassVar[int]
    model: Model
    previous_version: str
    num_canaries: int
    num_canaries_right: int
    num_shadow_requests: int
    rank_correlation: float
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ..., previous_version: _Optional[str] = ..., num_canaries: _Optional[int] = ..., num_canaries_right: _Optional[int] = ..., num_shadow_requests: _Optional[int] = ..., rank_correlation: _Optional[float] = ...) -> None: ...

class RollbackModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UpdateWeightsRequest(_message.Message):
    __slots__ = ("name", "source")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: str
    def __init__(self, name: _Optional[str] = ..., source: _Optional[str] = ...) -> None: ...
