mod numbers;
mod plans;
mod plans_random;
mod ranks;
