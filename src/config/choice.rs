//! The types whose values are a fixed set of words.

use std::fmt;

use toml::Value as Toml;

use super::value::{Value, quoted};

/// An enumeration whose values are written as texts.
macro_rules! choices {
    ($(
        $(#[doc = $about:literal])*
        $name:ident { $( $(#[doc = $doc:literal])* $variant:ident = $text:literal, )* }
    )*) => {$(
        $(#[doc = $about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $( $(#[doc = $doc])* $variant, )* }

        impl $name {
            /// As written in the configuration.
            pub const fn as_str(self) -> &'static str {
                match self { $( Self::$variant => $text, )* }
            }
        }

        impl Value for $name {
            fn kind() -> String {
                [$( concat!("\"", $text, "\"") ),*].join(" or ")
            }
            fn read(found: &Toml) -> Option<Self> {
                match found.as_str()? { $( $text => Some(Self::$variant), )* _ => None }
            }
            fn from_text(text: &str) -> Toml {
                Toml::String(text.to_owned())
            }
            fn show(&self) -> Option<String> {
                Some(quoted(self.as_str()))
            }
        }
    )*};
}

choices! {
    /// Where a partition that nobody has read yet starts.
    KafkaStart { Earliest = "earliest", Latest = "latest", }
    /// What becomes of a frame whose period is sealed.
    Late { Join = "join", Drop = "drop", }
    /// Whether the wall clock counts when every partition is idle.
    IdleMode { Clock = "clock", Hold = "hold", }
    /// The encoder's architecture.
    Architecture { VitTiny = "vit_tiny", Resnet18 = "resnet18", ResnetSmall = "resnet_small", }
    /// What holds the student to its teacher.
    Method { Lwf = "lwf", Cassle = "cassle", Finetune = "finetune", }
    /// What the products of training are computed in.
    Precision {
        /// bf16 where the device multiplies it faster, else f32.
        Auto = "auto",
        F32 = "f32",
        Bf16 = "bf16",
    }
    /// How the training process competes for cores.
    Priority {
        /// It gets what nobody else wants.
        Idle = "idle",
        /// As an equal.
        Normal = "normal",
    }
    /// The form of the log.
    LogFormat {
        /// Text on a terminal, JSON lines otherwise.
        Auto = "auto",
        Text = "text",
        Json = "json",
    }
}

/// Where tensors live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// The first CUDA device if there is one, else the CPU.
    Auto,
    Cpu,
    Cuda(usize),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl Value for Device {
    fn kind() -> String {
        "\"auto\", \"cpu\" or \"cuda:N\"".into()
    }
    fn read(found: &Toml) -> Option<Self> {
        match found.as_str()? {
            "auto" => Some(Self::Auto),
            "cpu" => Some(Self::Cpu),
            other => other.strip_prefix("cuda:")?.parse().ok().map(Self::Cuda),
        }
    }
    fn show(&self) -> Option<String> {
        Some(quoted(&self.to_string()))
    }
}
