/* Calls that must fail: their status, and words of their message. Counts what passed; any thread may call. */
#ifndef CP_TEST_EXPECT_H
#define CP_TEST_EXPECT_H

#include "context_parallel.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

static pthread_mutex_t expect_mutex = PTHREAD_MUTEX_INITIALIZER;
static int passed_count, failed_count;

static inline void count(int good) {
    pthread_mutex_lock(&expect_mutex);
    passed_count += good != 0;
    failed_count += good == 0;
    pthread_mutex_unlock(&expect_mutex);
}

/* The status, and if it is an error, words of the message, which starts with the status in words. */
static inline int expect_at(const char *file, int line, const char *call, cp_status got, cp_status wanted, const char *words) {
    const char *text = cp_last_error(), *phrase = cp_status_string(wanted);
    int good = got == wanted && (wanted == CP_OK || (strncmp(text, phrase, strlen(phrase)) == 0 && strstr(text, words) != NULL));
    if (!good)
        printf("FAIL %s:%d: %s\n     got %d (%s), wanted %d with \"%s\"\n", file, line, call, got,
               got == CP_OK ? "success" : text, wanted, words);
    count(good);
    return good;
}

static inline int true_at(const char *file, int line, const char *what, int good) {
    if (!good)
        printf("FAIL %s:%d: %s\n", file, line, what);
    count(good);
    return good;
}

#define EXPECT(wanted, words, call) expect_at(__FILE__, __LINE__, #call, (call), (wanted), (words))
#define GOOD(call) EXPECT(CP_OK, "", call)
#define BAD(words, call) EXPECT(CP_ERR_INVALID_ARGUMENT, words, call)
#define TRUE_(condition) true_at(__FILE__, __LINE__, #condition, (condition) != 0)

#endif /* CP_TEST_EXPECT_H */
