//! NCCL: the real library as far as it goes without a GPU (`real_nccl`), and ranks as threads on a GPU or the software one (`cuda`).

use super::*;
use std::ffi::OsString;

mod real_nccl {
    use super::*;

    /// The library that the environment variable names; not `find`, whose choice is this process's.
    fn real() -> &'static Api {
        let path = std::env::var_os("NCCL_LIBRARY").expect("NCCL_LIBRARY names a libnccl.so.2");
        let flags = libloading::os::unix::RTLD_NOW;
        Box::leak(Box::new(Api::open(&path, flags).expect("a library that can be opened")))
    }

    #[test]
    #[ignore = "needs NCCL itself, named by NCCL_LIBRARY: tests/run"]
    fn says_its_version_and_makes_unique_ids() {
        let api = real();
        assert_eq!(api.version(), 22707);
        let path = std::env::var("NCCL_LIBRARY").unwrap_or_default();
        assert_eq!(OsString::from(api.path()), OsString::from(&path));
        assert_eq!(api.description(), format!("2.27.7 ({path})"));
        let (one, two) = (new_id(api).expect("an id"), new_id(api).expect("an id"));
        assert_ne!(one, [0; 128]);
        assert_ne!(one, two);
    }

    #[test]
    #[ignore = "needs NCCL itself, named by NCCL_LIBRARY: tests/run"]
    fn without_a_gpu_init_fails_in_its_own_words() {
        let api = real();
        let id = new_id(api).expect("an id");
        let error = init(api, &id, 0, 1, Duration::from_secs(20), Options::default());
        let error = error.expect_err("there is no GPU");
        assert_eq!(error.status, Status::Nccl);
        assert!(
            error.text.starts_with("rank 0: ncclCommInitRankConfig: NCCL error 1, "),
            "{error}"
        );
        // From ncclGetLastError.
        assert!(error.text.contains("Cuda failure"), "{error}");
    }
}
