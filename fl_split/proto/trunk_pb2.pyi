from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    FLOAT32: _ClassVar[DType]
    BFLOAT16: _ClassVar[DType]
    INT8: _ClassVar[DType]
DTYPE_UNSPECIFIED: DType
FLOAT32: DType
BFLOAT16: DType
INT8: DType

class DescribeRequest(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    def __init__(self, nonce: _Optional[bytes] = ...) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("config_digest", "weights_digest", "model_type", "first_layer", "end_layer", "hidden_size", "dtypes", "max_tokens", "max_sequence_length", "trunk_id", "max_message_bytes", "version", "surrogate_digest", "surrogate_bytes", "exact_gradient", "compute_dtype", "quantization", "decode", "gradient_shares", "statement", "evidence")
    CONFIG_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_TYPE_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    END_LAYER_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    TRUNK_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SURROGATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SURROGATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXACT_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_SHARES_FIELD_NUMBER: _ClassVar[int]
    STATEMENT_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    config_digest: str
    weights_digest: str
    model_type: str
    first_layer: int
    end_layer: int
    hidden_size: int
    dtypes: _containers.RepeatedScalarFieldContainer[DType]
    max_tokens: int
    max_sequence_length: int
    trunk_id: bytes
    max_message_bytes: int
    version: str
    surrogate_digest: bytes
    surrogate_bytes: int
    exact_gradient: bool
    compute_dtype: str
    quantization: str
    decode: DecodeBounds
    gradient_shares: bool
    statement: bytes
    evidence: bytes
    def __init__(self, config_digest: _Optional[str] = ..., weights_digest: _Optional[str] = ..., model_type: _Optional[str] = ..., first_layer: _Optional[int] = ..., end_layer: _Optional[int] = ..., hidden_size: _Optional[int] = ..., dtypes: _Optional[_Iterable[_Union[DType, str]]] = ..., max_tokens: _Optional[int] = ..., max_sequence_length: _Optional[int] = ..., trunk_id: _Optional[bytes] = ..., max_message_bytes: _Optional[int] = ..., version: _Optional[str] = ..., surrogate_digest: _Optional[bytes] = ..., surrogate_bytes: _Optional[int] = ..., exact_gradient: bool = ..., compute_dtype: _Optional[str] = ..., quantization: _Optional[str] = ..., decode: _Optional[_Union[DecodeBounds, _Mapping]] = ..., gradient_shares: bool = ..., statement: _Optional[bytes] = ..., evidence: _Optional[bytes] = ...) -> None: ...

class DecodeBounds(_message.Message):
    __slots__ = ("bytes_per_token", "cache_bytes", "idle_s")
    BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    bytes_per_token: int
    cache_bytes: int
    idle_s: float
    def __init__(self, bytes_per_token: _Optional[int] = ..., cache_bytes: _Optional[int] = ..., idle_s: _Optional[float] = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("dtype", "hidden_states", "lengths", "positions", "outliers")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    OUTLIERS_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    hidden_states: bytes
    lengths: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    outliers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., hidden_states: _Optional[bytes] = ..., lengths: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[int]] = ..., outliers: _Optional[_Iterable[int]] = ...) -> None: ...

class ForwardReply(_message.Message):
    __slots__ = ("dtype", "hidden_states", "outliers", "trunk_id")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    OUTLIERS_FIELD_NUMBER: _ClassVar[int]
    TRUNK_ID_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    hidden_states: bytes
    outliers: _containers.RepeatedScalarFieldContainer[int]
    trunk_id: bytes
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., hidden_states: _Optional[bytes] = ..., outliers: _Optional[_Iterable[int]] = ..., trunk_id: _Optional[bytes] = ...) -> None: ...

class SurrogateRequest(_message.Message):
    __slots__ = ("offset",)
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    offset: int
    def __init__(self, offset: _Optional[int] = ...) -> None: ...

class SurrogateReply(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("forward", "gradient", "mask")
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    forward: ForwardRequest
    gradient: bytes
    mask: Mask
    def __init__(self, forward: _Optional[_Union[ForwardRequest, _Mapping]] = ..., gradient: _Optional[bytes] = ..., mask: _Optional[_Union[Mask, _Mapping]] = ...) -> None: ...

class Mask(_message.Message):
    __slots__ = ("seed", "std", "step")
    SEED_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    seed: bytes
    std: float
    step: float
    def __init__(self, seed: _Optional[bytes] = ..., std: _Optional[float] = ..., step: _Optional[float] = ...) -> None: ...

class PullReply(_message.Message):
    __slots__ = ("dtype", "gradient", "trunk_id")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    TRUNK_ID_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    gradient: bytes
    trunk_id: bytes
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., gradient: _Optional[bytes] = ..., trunk_id: _Optional[bytes] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("open", "step", "truncate", "reorder")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_FIELD_NUMBER: _ClassVar[int]
    REORDER_FIELD_NUMBER: _ClassVar[int]
    open: DecodeOpen
    step: ForwardRequest
    truncate: DecodeTruncate
    reorder: DecodeReorder
    def __init__(self, open: _Optional[_Union[DecodeOpen, _Mapping]] = ..., step: _Optional[_Union[ForwardRequest, _Mapping]] = ..., truncate: _Optional[_Union[DecodeTruncate, _Mapping]] = ..., reorder: _Optional[_Union[DecodeReorder, _Mapping]] = ...) -> None: ...

class DecodeOpen(_message.Message):
    __slots__ = ("sequences", "max_tokens")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    sequences: int
    max_tokens: int
    def __init__(self, sequences: _Optional[int] = ..., max_tokens: _Optional[int] = ...) -> None: ...

class DecodeTruncate(_message.Message):
    __slots__ = ("lengths",)
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lengths: _Optional[_Iterable[int]] = ...) -> None: ...

class DecodeReorder(_message.Message):
    __slots__ = ("sources",)
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    sources: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sources: _Optional[_Iterable[int]] = ...) -> None: ...
