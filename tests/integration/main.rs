mod numbers;
mod plans;
mod ranks;
