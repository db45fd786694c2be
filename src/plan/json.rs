//! Plans as JSON.
/// One plan.
pub fn plan(plan: &super::Plan) -> String {
    format!("{{\"rank\":{}}}", plan.rank)
}
