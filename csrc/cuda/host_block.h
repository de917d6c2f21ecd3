// The Blocks that emulate a GPU's on the CPU, see platform.cuh: one thread, and several that meet at a barrier.

#pragma once

#include <atomic>
#include <barrier>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "cuda/platform.cuh"

namespace flexlora::host {

// What both have in common: a thread is a team of one lane, and stands for a whole warp.
struct Lane {
    int lane() const { return 0; }
    int lanes() const { return 1; }
    double sum(double x) const { return x; }

    // Warps that one thread stands for, at most.
    static constexpr int slots(int warps) { return warps; }

    struct Operand {
        double x[8][4];
    };
    struct Sum {
        double x[8][8];
    };
    void clear(Sum& sum) const { std::memset(&sum, 0, sizeof sum); }
    template <typename F>
    void load(Operand& operand, F f) const {
        for (int i = 0; i < 8; ++i)
            for (int k = 0; k < 4; ++k) operand.x[i][k] = f(i, k);
    }
    void multiply(Sum& sum, const Operand& a, const Operand& b) const {
        for (int i = 0; i < 8; ++i)
            for (int j = 0; j < 8; ++j)
                for (int k = 0; k < 4; ++k) sum.x[i][j] += a.x[i][k] * b.x[j][k];
    }
    void multiply_two(Sum& upper, Sum& lower, const Operand& a, const Operand& c, const Operand& b) const {
        multiply(upper, a, b);
        multiply(lower, c, b);
    }
    template <typename F>
    void store(const Sum& sum, F f) const {
        for (int i = 0; i < 8; ++i)
            for (int j = 0; j < 8; ++j) f(i, j, sum.x[i][j]);
    }

    void copy4(float* to, const float* from, int count) const {
        for (int i = 0; i < 4; ++i) to[i] = i < count ? from[i] : 0.0f;
    }
    void copy1(float* to, const float* from, int count) const { *to = count ? *from : 0.0f; }
    void commit() const {}
    template <int pending>
    void wait() const {}
};

class Single : public Lane {
public:
    int rank() const { return 0; }
    int size() const { return 1; }
    void sync() {}
    bool any(bool x) { return x; }
    int row() const { return 0; }
    int rows() const { return 1; }
    int column() const { return 0; }
    int columns() const { return 1; }
    int team() const { return 0; }
    int teams() const { return 1; }
    int warp() const { return 0; }
    int warps() const { return 1; }
};

// What the threads of a Team share.
struct Meeting {
    explicit Meeting(int size) : barrier(size), said(size) {}
    std::barrier<> barrier;
    std::vector<char> said;
};

class Team : public Lane {
public:
    Team(int rank, int size, Meeting& meeting) : rank_(rank), size_(size), meeting_(meeting) {}
    int rank() const { return rank_; }
    int size() const { return size_; }
    void sync() { meeting_.barrier.arrive_and_wait(); }
    bool any(bool x) {
        meeting_.said[rank_] = x;
        sync();
        bool found = false;
        for (const char said : meeting_.said) found |= said != 0;
        sync();  // before the next question overwrites the answers
        return found;
    }
    // Two columns where there can be: then entries of a row have other threads than the row in for_each, as on a GPU.
    int row() const { return rank_ / columns(); }
    int rows() const { return size_ / columns(); }
    int column() const { return rank_ % columns(); }
    int columns() const { return size_ % 2 == 0 ? 2 : 1; }
    int team() const { return rank_; }
    int teams() const { return size_; }
    int warp() const { return rank_; }
    int warps() const { return size_; }

private:
    int rank_, size_;
    Meeting& meeting_;
};

// work(block) for a block of so many threads.
template <typename Work>
void run(int threads, const Work& work) {
    if (threads == 1) {
        Single block;
        work(block);
        return;
    }
    Meeting meeting(threads);
    std::vector<std::thread> crew;
    for (int rank = 0; rank < threads; ++rank)
        crew.emplace_back([&, rank] {
            Team block(rank, threads, meeting);
            work(block);
        });
    for (std::thread& thread : crew) thread.join();
}

}  // namespace flexlora::host
