from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Overflow(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OVERFLOW_ERROR: _ClassVar[Overflow]
    OVERFLOW_TRUNCATE_PROMPT_LEFT: _ClassVar[Overflow]
    OVERFLOW_TRUNCATE_RESPONSE_RIGHT: _ClassVar[Overflow]

class Granularity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GRANULARITY_OUTCOME: _ClassVar[Granularity]
    GRANULARITY_STEP: _ClassVar[Granularity]

class StepReduction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STEP_REDUCTION_MIN: _ClassVar[StepReduction]
    STEP_REDUCTION_MEAN: _ClassVar[StepReduction]
    STEP_REDUCTION_PRODUCT: _ClassVar[StepReduction]
    STEP_REDUCTION_LAST: _ClassVar[StepReduction]

class ScoreKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCORE_KIND_UNSPECIFIED: _ClassVar[ScoreKind]
    SCORE_KIND_RAW_LOGIT: _ClassVar[ScoreKind]
    SCORE_KIND_PROBABILITY: _ClassVar[ScoreKind]
    SCORE_KIND_NORMALIZED: _ClassVar[ScoreKind]
    SCORE_KIND_RATING: _ClassVar[ScoreKind]
OVERFLOW_ERROR: Overflow
OVERFLOW_TRUNCATE_PROMPT_LEFT: Overflow
OVERFLOW_TRUNCATE_RESPONSE_RIGHT: Overflow
GRANULARITY_OUTCOME: Granularity
GRANULARITY_STEP: Granularity
STEP_REDUCTION_MIN: StepReduction
STEP_REDUCTION_MEAN: StepReduction
STEP_REDUCTION_PRODUCT: StepReduction
STEP_REDUCTION_LAST: StepReduction
SCORE_KIND_UNSPECIFIED: ScoreKind
SCORE_KIND_RAW_LOGIT: ScoreKind
SCORE_KIND_PROBABILITY: ScoreKind
SCORE_KIND_NORMALIZED: ScoreKind
SCORE_KIND_RATING: ScoreKind

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class Conversation(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("text", "conversation", "token_ids", "rendered")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CONVERSATION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    RENDERED_FIELD_NUMBER: _ClassVar[int]
    text: str
    conversation: Conversation
    token_ids: bytes
    rendered: str
    def __init__(self, text: _Optional[str] = ..., conversation: _Optional[_Union[Conversation, _Mapping]] = ..., token_ids: _Optional[bytes] = ..., rendered: _Optional[str] = ...) -> None: ...

class Steps(_message.Message):
    __slots__ = ("texts",)
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, texts: _Optional[_Iterable[str]] = ...) -> None: ...

class Response(_message.Message):
    __slots__ = ("text", "token_ids", "steps", "step_ends")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    STEP_ENDS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: bytes
    steps: Steps
    step_ends: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[bytes] = ..., steps: _Optional[_Union[Steps, _Mapping]] = ..., step_ends: _Optional[_Iterable[int]] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("id", "prompt", "responses")
    ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    RESPONSES_FIELD_NUMBER: _ClassVar[int]
    id: str
    prompt: Prompt
    responses: _containers.RepeatedCompositeFieldContainer[Response]
    def __init__(self, id: _Optional[str] = ..., prompt: _Optional[_Union[Prompt, _Mapping]] = ..., responses: _Optional[_Iterable[_Union[Response, _Mapping]]] = ...) -> None: ...

class ScoreOptions(_message.Message):
    __slots__ = ("overflow", "priority", "granularity", "step_reduction", "step_separator", "cache_response")
    OVERFLOW_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    GRANULARITY_FIELD_NUMBER: _ClassVar[int]
    STEP_REDUCTION_FIELD_NUMBER: _ClassVar[int]
    STEP_SEPARATOR_FIELD_NUMBER: _ClassVar[int]
    CACHE_RESPONSE_FIELD_NUMBER: _ClassVar[int]
    overflow: Overflow
    priority: int
    granularity: Granularity
    step_reduction: StepReduction
    step_separator: str
    cache_response: bool
    def __init__(self, overflow: _Optional[_Union[Overflow, str]] = ..., priority: _Optional[int] = ..., granularity: _Optional[_Union[Granularity, str]] = ..., step_reduction: _Optional[_Union[StepReduction, str]] = ..., step_separator: _Optional[str] = ..., cache_response: bool = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("request_id", "model", "groups", "options", "timeout_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    options: ScoreOptions
    timeout_s: float
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ..., options: _Optional[_Union[ScoreOptions, _Mapping]] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class ItemScore(_message.Message):
    __slots__ = ("status", "score", "kind", "num_prompt_tokens", "num_response_tokens", "num_cached_tokens", "truncated", "raw_score", "step_scores", "attributes", "std", "ensemble")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_RESPONSE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    RAW_SCORE_FIELD_NUMBER: _ClassVar[int]
    STEP_SCORES_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    ENSEMBLE_FIELD_NUMBER: _ClassVar[int]
    status: _status_pb2.Status
    score: float
    kind: ScoreKind
    num_prompt_tokens: int
    num_response_tokens: int
    num_cached_tokens: int
    truncated: bool
    raw_score: float
    step_scores: _containers.RepeatedScalarFieldContainer[float]
    attributes: _containers.RepeatedScalarFieldContainer[float]
    std: float
    ensemble: EnsembleScore
    def __init__(self, status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., score: _Optional[float] = ..., kind: _Optional[_Union[ScoreKind, str]] = ..., num_prompt_tokens: _Optional[int] = ..., num_response_tokens: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., truncated: bool = ..., raw_score: _Optional[float] = ..., step_scores: _Optional[_Iterable[float]] = ..., attributes: _Optional[_Iterable[float]] = ..., std: _Optional[float] = ..., ensemble: _Optional[_Union[EnsembleScore, _Mapping]] = ...) -> None: ...

class EnsembleScore(_message.Message):
    __slots__ = ("mean", "min", "scores", "raw_scores")
    MEAN_FIELD_NUMBER: _ClassVar[int]
    MIN_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    RAW_SCORES_FIELD_NUMBER: _ClassVar[int]
    mean: float
    min: float
    scores: _containers.RepeatedScalarFieldContainer[float]
    raw_scores: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, mean: _Optional[float] = ..., min: _Optional[float] = ..., scores: _Optional[_Iterable[float]] = ..., raw_scores: _Optional[_Iterable[float]] = ...) -> None: ...

class GroupScore(_message.Message):
    __slots__ = ("id", "items")
    ID_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    id: str
    items: _containers.RepeatedCompositeFieldContainer[ItemScore]
    def __init__(self, id: _Optional[str] = ..., items: _Optional[_Iterable[_Union[ItemScore, _Mapping]]] = ...) -> None: ...

class StageTimings(_message.Message):
    __slots__ = ("admission_s", "tokenization_s", "queue_s", "compute_s", "total_s")
    ADMISSION_S_FIELD_NUMBER: _ClassVar[int]
    TOKENIZATION_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    admission_s: float
    tokenization_s: float
    queue_s: float
    compute_s: float
    total_s: float
    def __init__(self, admission_s: _Optional[float] = ..., tokenization_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., total_s: _Optional[float] = ...) -> None: ...

class ModelVersion(_message.Message):
    __slots__ = ("name", "version", "attributes", "members")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    attributes: _containers.RepeatedScalarFieldContainer[str]
    members: _containers.RepeatedCompositeFieldContainer[ModelVersion]
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., attributes: _Optional[_Iterable[str]] = ..., members: _Optional[_Iterable[_Union[ModelVersion, _Mapping]]] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("request_id", "model", "groups", "timings", "error")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: ModelVersion
    groups: _containers.RepeatedCompositeFieldContainer[GroupScore]
    timings: StageTimings
    error: _status_pb2.Status
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[_Union[ModelVersion, _Mapping]] = ..., groups: _Optional[_Iterable[_Union[GroupScore, _Mapping]]] = ..., timings: _Optional[_Union[StageTimings, _Mapping]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class RankRequest(_message.Message):
    __slots__ = ("request_id", "model", "prompt", "responses", "top_k", "options")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    RESPONSES_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    prompt: Prompt
    responses: _containers.RepeatedCompositeFieldContainer[Response]
    top_k: int
    options: ScoreOptions
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., prompt: _Optional[_Union[Prompt, _Mapping]] = ..., responses: _Optional[_Iterable[_Union[Response, _Mapping]]] = ..., top_k: _Optional[int] = ..., options: _Optional[_Union[ScoreOptions, _Mapping]] = ...) -> None: ...

class RankedResponse(_message.Message):
    __slots__ = ("index", "item")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ITEM_FIELD_NUMBER: _ClassVar[int]
    index: int
    item: ItemScore
    def __init__(self, index: _Optional[int] = ..., item: _Optional[_Union[ItemScore, _Mapping]] = ...) -> None: ...

class RankResponse(_message.Message):
    __slots__ = ("request_id", "model", "ranked", "failed", "timings")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RANKED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: ModelVersion
    ranked: _containers.RepeatedCompositeFieldContainer[RankedResponse]
    failed: _containers.RepeatedCompositeFieldContainer[RankedResponse]
    timings: StageTimings
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[_Union[ModelVersion, _Mapping]] = ..., ranked: _Optional[_Iterable[_Union[RankedResponse, _Mapping]]] = ..., failed: _Optional[_Iterable[_Union[RankedResponse, _Mapping]]] = ..., timings: _Optional[_Union[StageTimings, _Mapping]] = ...) -> None: ...

class CompareRequest(_message.Message):
    __slots__ = ("request_id", "model", "prompt", "response_a", "response_b", "options")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_A_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_B_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    prompt: Prompt
    response_a: Response
    response_b: Response
    options: ScoreOptions
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., prompt: _Optional[_Union[Prompt, _Mapping]] = ..., response_a: _Optional[_Union[Response, _Mapping]] = ..., response_b: _Optional[_Union[Response, _Mapping]] = ..., options: _Optional[_Union[ScoreOptions, _Mapping]] = ...) -> None: ...

class CompareResponse(_message.Message):
    __slots__ = ("request_id", "model", "a", "b", "margin", "probability_a", "timings")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    A_FIELD_NUMBER: _ClassVar[int]
    B_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_A_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: ModelVersion
    a: ItemScore
    b: ItemScore
    margin: float
    probability_a: float
    timings: StageTimings
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[_Union[ModelVersion, _Mapping]] = ..., a: _Optional[_Union[ItemScore, _Mapping]] = ..., b: _Optional[_Union[ItemScore, _Mapping]] = ..., margin: _Optional[float] = ..., probability_a: _Optional[float] = ..., timings: _Optional[_Union[StageTimings, _Mapping]] = ...) -> None: ...
