pub mod frame;
pub mod position;
pub mod segment;
pub mod window;
