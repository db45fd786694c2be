// The device thread: takes the operations of all streams in an order that CUDA allows and a test dislikes, and what the host waits with.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <chrono>

#include "access.h"
#include "driver.h"

namespace softgpu {
namespace driver {

thread_local bool on_device_thread = false;
thread_local const Done* executing = nullptr;
thread_local Accesses* recording = nullptr;

namespace {

// Streams are ranked at random and the highest that can go on always goes on; after some operations the ranks are drawn again. So one
// stream runs as far ahead of the others as it may. In every other epoch nothing is done until a host thread waits or some time has passed,
// so that what the host does too early shows.
struct Epoch {
    uint64_t number = 0;
    uint32_t left = 0;
    bool lazy = false;
    double hold = 0;
};
Epoch epoch;

void draw_epoch() {
    epoch.number++;
    const uint64_t r = mix64(driver.seed ^ mix64(epoch.number));
    epoch.left = 1 + (uint32_t)(r % 40);
    epoch.lazy = r >> 32 & 1;
    epoch.hold = now() + 1e-3 * (1 + (r >> 40) % 4);
}
uint64_t rank_of(const Queue& q) { return mix64(driver.seed ^ mix64(epoch.number * 0x10001 + q.id)); }

bool ready(const Op& op) {
    for (const DonePtr& d : op.waits)
        if (!d->done) return false;
    return true;
}

void finish(Op& op) {
    op.done->done = true;
    op.done->time = now();
    driver.completed++;
}

// A failed operation ends its device: everything enqueued there is dropped.
void fail_device(int device, Result result, std::vector<ActionPtr>& dropped) {
    Context& c = *driver.contexts[(size_t)device];
    if (c.sticky == SUCCESS) c.sticky = result;
    for (const QueuePtr& q : driver.queues)
        if (q->device == device)
            while (!q->ops.empty()) {
                finish(q->ops.front());
                dropped.push_back(q->ops.front().action);
                q->ops.pop_front();
            }
}

void device_thread() {
    on_device_thread = true;
    Lock lock(driver.mutex);
    draw_epoch();
    std::set<const Queue*> not_yet;  // polled without success since anything happened
    for (;;) {
        auto& queues = driver.queues;
        queues.erase(std::remove_if(queues.begin(), queues.end(), [](const QueuePtr& q) { return q->ops.empty(); }), queues.end());
        QueuePtr best;
        uint64_t best_rank = 0;
        bool polling = false;
        for (const QueuePtr& q : queues) {
            if (!ready(q->ops.front())) continue;
            if (not_yet.count(q.get())) {
                polling = true;
                continue;
            }
            const uint64_t r = rank_of(*q);
            if (!best || r > best_rank) {
                best = q;
                best_rank = r;
            }
        }
        if (!best) {
            not_yet.clear();
            if (polling)
                driver.work.wait_for(lock, std::chrono::microseconds(driver.host_waits ? 100 : 1000), [] { return driver.woken; });
            else
                driver.work.wait(lock);
            driver.woken = false;
            continue;
        }
        if (epoch.lazy && !driver.host_waits && now() < epoch.hold) {
            driver.work.wait_for(lock, std::chrono::microseconds(200));
            continue;
        }
        Op& op = best->ops.front();  // stays where it is: only this thread takes operations out
        int result = SOFTGPU_DONE;
        std::string why;
        if (op.action && op.action->execute) {
            const ActionPtr action = op.action;
            const uint64_t run = op.run;
            driver.executing = true;
            driver.busy = !action->polls;
            lock.unlock();
            if (driver.trace && !action->polls) fprintf(stderr, "softgpu: %s: %s\n", best->name.c_str(), action->name.c_str());
            Accesses accesses;
            executing = op.done.get();
            if (driver.races) recording = &accesses;
            result = action->execute(run, why);
            recording = nullptr;
            lock.lock();
            if (driver.races && result >= 0) {
                why = find_race(*op.done, accesses);
                if (!why.empty()) result = -LAUNCH_FAILED;
            }
            driver.executing = driver.busy = false;
        }
        if (result == SOFTGPU_NOT_YET) {
            not_yet.insert(best.get());
            driver.progress.notify_all();
            continue;
        }
        not_yet.clear();
        std::vector<ActionPtr> dropped;
        if (result == SOFTGPU_DONE) {
            if (op.action && op.action->count) ++*op.action->count;
            finish(op);
            dropped.push_back(op.action);
            best->ops.pop_front();
        } else {
            const Result code = result < 0 ? (Result)-result : LAUNCH_FAILED;
            fprintf(stderr, "softgpu: device %d: %s on %s failed: %s\n", best->device, op.action->name.c_str(), best->name.c_str(), why.c_str());
            fail_device(best->device, code, dropped);
        }
        if (--epoch.left == 0) draw_epoch();
        driver.progress.notify_all();
        lock.unlock();
        dropped.clear();  // may call back: release of an operation
        lock.lock();
    }
}

void report_streams() {
    fprintf(stderr, "softgpu: what the streams wait for:\n");
    for (const QueuePtr& q : driver.queues) {
        if (q->ops.empty()) continue;
        const Op& op = q->ops.front();
        fprintf(stderr, "  %s (device %d), %zu operations: head is %s", q->name.c_str(), q->device, q->ops.size(),
                op.action ? op.action->name.c_str() : op.done->what.c_str());
        const char* separator = ", waiting for ";
        for (const DonePtr& d : op.waits)
            if (!d->done) {
                fprintf(stderr, "%s%s", separator, d->what.c_str());
                separator = " and ";
            }
        fprintf(stderr, "%s\n", ready(op) ? (op.action && op.action->polls ? ", which is not done yet" : ", executing or ready") : "");
    }
}

}  // namespace

QueuePtr make_queue(int device, const std::string& name) {
    QueuePtr q = std::make_shared<Queue>();
    q->id = driver.next_id++;
    q->device = device;
    q->name = name + " " + std::to_string(q->id);
    return q;
}

void push(const QueuePtr& queue, Op op) {
    if (!op.done) op.done = std::make_shared<Done>();
    if (op.done->what.empty()) op.done->what = (op.action ? op.action->name : std::string("an event wait")) + " on " + queue->name;
    op.run = driver.next_id++;
    order_push(*queue, op);
    queue->last = op.done;
    if (std::find(driver.queues.begin(), driver.queues.end(), queue) == driver.queues.end()) {
        driver.queues.push_back(queue);
        driver.woken = true;
    }
    queue->ops.push_back(std::move(op));
    if (!driver.thread_started) {
        driver.thread_started = true;
        std::thread(device_thread).detach();
    }
    driver.work.notify_all();
}

Result enqueue(Stream& stream, const ActionPtr& action, std::vector<DonePtr> waits, DonePtr done) {
    if (stream.capture) return capture_node(stream, action);
    Context& context = *driver.contexts[(size_t)stream.device];
    // The legacy default stream and the blocking streams wait for each other.
    if (stream.legacy) {
        for (Stream* s : driver.streams)
            if (s->blocking && s->device == stream.device) {
                if (s->capture) {
                    s->capture->invalid = true;
                    return complain(CAPTURE_IMPLICIT, "an operation on the default stream while a blocking stream captures");
                }
                if (s->queue->last && (driver.races || !s->queue->last->done)) waits.push_back(s->queue->last);
            }
    } else if (stream.blocking && context.legacy && context.legacy->queue->last &&
               (driver.races || !context.legacy->queue->last->done)) {
        waits.push_back(context.legacy->queue->last);
    }
    push(stream.queue, Op{action, std::move(waits), std::move(done), 0});
    return SUCCESS;
}

std::vector<DonePtr> all_work(int device) {
    std::vector<DonePtr> all;
    for (const QueuePtr& q : driver.queues)
        if (q->device == device && q->last && !q->last->done) all.push_back(q->last);
    return all;
}

Result wait_host(Lock& lock, const std::vector<DonePtr>& all, const char* what) {
    auto done = [&] { return std::all_of(all.begin(), all.end(), [](const DonePtr& d) { return d->done; }); };
    if (done()) {
        for (const DonePtr& d : all) order_host(*d);
        return SUCCESS;
    }
    driver.host_waits++;
    driver.work.notify_all();
    uint64_t seen = driver.completed;
    double since = now();
    Result result = SUCCESS;
    while (!done()) {
        driver.progress.wait_for(lock, std::chrono::milliseconds(100));
        if (driver.completed != seen || driver.busy) {
            seen = driver.completed;
            since = now();
        }
        if (now() - since > driver.timeout) {
            complain(LAUNCH_TIMEOUT, "%s: nothing happened for %.1f s", what, driver.timeout);
            report_streams();
            result = LAUNCH_TIMEOUT;
            break;
        }
    }
    driver.host_waits--;
    if (!result)
        for (const DonePtr& d : all) order_host(*d);
    return result;
}

void wait_not_executing(Lock& lock) {
    driver.progress.wait(lock, [] { return !driver.executing; });
}

}  // namespace driver
}  // namespace softgpu

extern "C" void softgpu_wake(void) {
    softgpu::driver::Lock lock(softgpu::driver::driver.mutex);
    softgpu::driver::driver.woken = true;
    softgpu::driver::driver.work.notify_all();
}
